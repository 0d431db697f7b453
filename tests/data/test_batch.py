import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.batch import BatchOptions, make_batch
from megatron.data.errors import DataError

EOD = 0


def reference(tokens, eod):
    """Megatron's masks and positions of one sample, document by document."""
    length = len(tokens)
    allowed = [[key <= query for key in range(length)] for query in range(length)]
    positions = list(range(length))
    loss_mask = [1.0] * length
    begin = 0
    for i in range(length):
        if tokens[i] != eod:
            continue
        loss_mask[i] = 0.0
        for query in range(i + 1, length):
            for key in range(i + 1):
                allowed[query][key] = False
            positions[query] -= i + 1 - begin
        begin = i + 1
    return allowed, positions, loss_mask


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_masks_and_positions_equal_the_loop_over_documents(rows):
    options = BatchOptions(
        eod_id=EOD, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, dense_mask=True
    )
    batch = make_batch([np.array(row) for row in rows], options)
    for i, row in enumerate(rows):
        allowed, positions, loss_mask = reference(row[:-1], EOD)
        assert batch.tokens[i].tolist() == row[:-1]
        assert batch.labels[i].tolist() == row[1:]
        assert batch.attention_mask[i, 0].tolist() == allowed
        assert batch.position_ids[i].tolist() == positions
        assert batch.loss_mask[i].tolist() == loss_mask


def test_types_and_shapes_are_those_of_the_contract():
    options = BatchOptions(
        eod_id=EOD, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, dense_mask=True
    )
    batch = make_batch([np.arange(7)] * 2, options)
    assert (batch.tokens.dtype, batch.tokens.shape) == (torch.int64, (2, 6))
    assert (batch.labels.dtype, batch.labels.is_contiguous()) == (torch.int64, True)
    assert (batch.loss_mask.dtype, batch.loss_mask.shape) == (torch.float32, (2, 6))
    assert (batch.position_ids.dtype, batch.position_ids.shape) == (torch.int64, (2, 6))
    assert (batch.attention_mask.dtype, batch.attention_mask.shape) == (torch.bool, (2, 1, 6, 6))


def test_without_flags_a_batch_is_tokens_and_labels_alone():
    batch = make_batch([np.array([3, 0, 4])], BatchOptions())
    assert (batch.tokens.tolist(), batch.labels.tolist()) == ([[3, 0]], [[0, 4]])
    rest = (batch.loss_mask, batch.position_ids, batch.attention_mask, batch.document_ids)
    assert rest == (None, None, None, None)


def test_documents_are_numbered_when_no_dense_mask_is_asked_for():
    batch = make_batch([np.array([3, 0, 4, 0, 0, 5, 6])], BatchOptions(eod_id=EOD, reset_attention_mask=True))
    assert batch.attention_mask is None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 2, 3]]


@pytest.mark.parametrize("bad", [-1, 50])
def test_ids_outside_the_vocabulary_are_refused(bad):
    make_batch([np.array([0, 49])], BatchOptions(vocab_size=50))
    with pytest.raises(DataError, match=f"token id {bad}, and the vocabulary has 50"):
        make_batch([np.array([1, 2]), np.array([1, bad])], BatchOptions(vocab_size=50))


@pytest.mark.parametrize("flag", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_a_tokenizer_without_end_of_document_is_refused(flag):
    with pytest.raises(DataError, match=f"--{flag.replace('_', '-')} needs an end-of-document token"):
        BatchOptions(**{flag: True})


def test_a_batch_moves_with_all_it_has():
    options = BatchOptions(eod_id=EOD, eod_mask_loss=True)
    moved = make_batch([np.array([3, 0, 4])], options).to("meta")
    assert moved.tokens.is_meta
    assert moved.loss_mask.is_meta
    assert moved.position_ids is None
