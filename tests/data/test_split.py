import pytest

from megatron.data.errors import DataError
from megatron.data.split import parse_split, split_documents


@pytest.mark.parametrize(
    ("split", "documents", "bounds"),
    [
        ("969,30,1", 1000, (969, 999, 1000)),
        ("969,30,1", 333, (323, 333, 333)),  # 322.677, 332.667, 333
        ("0.9,0.05,0.05", 10, (9, 10, 10)),  # 9.5 rounds to the even 10 (its double is 9.500000000000002)
        ("1,1", 5, (2, 5, 5)),  # 2.5 rounds to the even 2
        ("1", 7, (7, 7, 7)),
        ("0,1,0", 7, (0, 7, 7)),
        ("99/1/0", 200, (198, 200, 200)),
    ],
)
def test_ranges_follow_megatrons_rounding_of_cumulated_shares(split, documents, bounds):
    train, valid, test = split_documents(parse_split(split), documents)
    assert (train.start, train.stop, valid.start, valid.stop, test.start) == (0, *bounds[:1] * 2, *bounds[1:2] * 2)
    assert test.stop == bounds[2] == documents


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2", "1,2,3,4", "nan", "inf,1"])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(DataError, match=r"--split .* is not up to three shares"):
        parse_split(split)
