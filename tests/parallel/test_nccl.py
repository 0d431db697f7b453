"""What the other files of this folder prove over gloo, and what halves of a micro-batch do, once more over NCCL."""

import pytest
import torch

from tests.model import test_graphed_blocks as graphed_blocks
from tests.model import test_halves as halves
from tests.parallel import test_collectives as collectives
from tests.parallel import test_cross_entropy as cross_entropy
from tests.parallel import test_embedding as embedding
from tests.parallel import test_linear as linear
from tests.parallel import test_linear_cross_entropy as linear_cross_entropy
from tests.parallel import test_qkv as qkv
from tests.parallel import test_recompute as recompute
from tests.parallel import test_ulysses as ulysses
from tests.ranks import run_on_ranks


def on_gpu(check, *args):
    torch.set_default_device("cuda")
    check(*args)


def name_of(item):
    return getattr(item, "__name__", None) or str(item)


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("check", "args"),
    [
        (collectives.backward_is_the_conjugates_forward, ()),
        (collectives.forward_is_what_it_says, ()),
        (collectives.norm_matches_dense, ()),
        (linear.column_matches_dense, (True, False)),
        (linear.column_matches_dense, (True, True)),
        (linear.column_matches_dense, (True, True, True)),
        (linear.row_matches_dense, (True, False)),
        (linear.row_matches_dense, (True, True)),
        (linear.gated_mlp_matches_dense, (True,)),
        (halves.halves_change_no_number, ("gpt2", 4, 0)),
        (halves.halves_change_no_number, ("one key/value head", 2, 24)),
        (graphed_blocks.recorded_tensor_ranks_train_the_same_model, (False,)),
        (graphed_blocks.recorded_tensor_ranks_train_the_same_model, (True,)),
        (embedding.embedding_matches_dense, (False,)),
        (embedding.embedding_matches_dense, (True,)),
        (embedding.positions_match_dense, (False,)),
        (embedding.positions_match_dense, (True,)),
        (qkv.grouped_attention_matches_dense, (1, False)),
        (qkv.grouped_attention_matches_dense, (1, True)),
        (qkv.grouped_attention_matches_dense, (2, True)),
        (ulysses.attention_matches_dense, (4, 2)),
        (ulysses.attention_matches_dense, (4, 1)),
        (ulysses.trades, ()),
        (cross_entropy.matches_torch, (12,)),
        (cross_entropy.matches_torch, (20,)),
        (linear_cross_entropy.sharded_is_the_whole, (False, 10)),
        (linear_cross_entropy.sharded_is_the_whole, (True, 10)),
        (recompute.recompute_changes_nothing_on_ranks, ()),
    ],
    ids=lambda value: "-".join(name_of(item) for item in (value if isinstance(value, tuple) else [value])),
)
def test_what_holds_over_gloo_holds_over_nccl(check, args):
    run_on_ranks(2, on_gpu, check, *args, backend="nccl")
