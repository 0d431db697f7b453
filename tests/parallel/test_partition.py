import pytest

from megatron.parallel.partition import balance_blocks, stage_parts


@pytest.mark.parametrize(
    ("blocks", "stages", "last", "expected"),
    [
        (8, 1, 0.0, (8,)),
        (8, 4, 0.0, (2, 2, 2, 2)),
        (7, 3, 0.0, (2, 2, 3)),
        (24, 4, 4.0, (7, 7, 7, 3)),
        (4, 4, 9.0, (1, 1, 1, 1)),
        (12, 2, 5.4, (9, 3)),
    ],
)
def test_slowest_stage_is_as_fast_as_can_be(blocks, stages, last, expected):
    assert balance_blocks(blocks, stages, last=last) == expected


def test_fewer_blocks_than_stages_are_refused():
    with pytest.raises(ValueError, match="3 blocks cannot be divided over 4 stages"):
        balance_blocks(3, 4)


def test_stages_hold_every_layer_once_with_the_ends_outside_the_blocks():
    assert stage_parts((1, 3, 2)) == [range(3), range(3, 6), range(6, 10)]
    assert stage_parts((2,)) == [range(6)]
