"""Defects that systems of this kind have had, or could have, to be switched on in the ranks of a layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from megatron.model import gpt, init, rotary
from megatron.parallel import ulysses
from megatron.parallel.collectives import Scattering, gather_dim, reduce_from_group, reduce_scatter_sequence, split_dim
from megatron.parallel.embedding import VocabParallelEmbedding, _rows_held_here
from megatron.parallel.linear import RowOutput, RowParallelLinear
from megatron.parallel.qkv import QueryKeyValueLinear
from megatron.parallel.random import RandomStreams

Defect = Callable[[], AbstractContextManager[object]]


def none() -> AbstractContextManager[object]:
    return contextlib.nullcontext()


def norm_gradients_are_not_summed():
    """Each tensor rank keeps the part of its shard of the sequence."""
    return patch("megatron.model.norm.Norm.read", lambda norm: norm.summed_parameters)


def tokens_are_sliced_before_the_embedding():
    """Each tensor rank looks up other tokens, and the sum over the ranks adds them up."""

    def forward(self, tokens_bs):
        tokens_sb = split_dim(tokens_bs.t(), self.group, 0)
        return reduce_from_group(_rows_held_here(tokens_sb, self.weight, self.group), self.group)

    return patch.object(VocabParallelEmbedding, "forward", forward)


def hidden_states_are_scattered_twice():
    """The embedding has scattered the sequence already; the second time is gathered again, of all ranks' halves."""
    right = VocabParallelEmbedding.forward

    def forward(self, tokens_bs):
        half = split_dim(right(self, tokens_bs), self.group, 0)
        return gather_dim(half, self.group, 0)

    return patch.object(VocabParallelEmbedding, "forward", forward)


def rotary_tables_hold_cosines_only():
    right = rotary.rotary_tables

    def tables(*args):
        cos, _ = right(*args)
        return cos, cos

    return patch.object(rotary, "rotary_tables", tables)


def heads_are_cut_in_thirds():
    """All queries, then all keys, then all values, instead of one group of heads after the other."""

    def heads(self, product):
        counts = (self.query_heads, self.key_value_heads, self.key_value_heads)
        parts = product.split([count * self.head_size for count in counts], dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_size)) for part in parts)

    return patch.multiple(QueryKeyValueLinear, heads=heads, is_grouped=False)  # else attention cuts it itself


def loss_is_averaged_on_each_rank():
    """The mean of the ranks' means, which weigh a token by how few its rank has."""

    def count_tokens(self, micro_batches):
        own = sum(micro_batch.loss_mask.sum(dtype=torch.float64) for micro_batch in micro_batches)
        return (own * self._replicas.size).to(self.device)

    return patch("megatron.engine.flat.FlatEngine._count_tokens", count_tokens)


def tied_gradient_is_not_summed():
    return patch("megatron.engine.pipeline._reduce_tied_gradients", lambda engine: None)


def shards_start_like_their_neighbour():
    right = init.slice_of
    return patch.object(init, "slice_of", lambda logical, sharding: right(logical, sharding, rank=0))


@contextlib.contextmanager
def tensor_ranks_drop_alike() -> Iterator[None]:
    """Shards of the sequence and heads are dropped by the stream that all tensor ranks share."""
    with contextlib.ExitStack() as stack:
        for user in ("attention", "dropout"):
            stack.enter_context(
                patch(f"megatron.model.{user}.rank_stream", lambda group, device: contextlib.nullcontext())
            )
        yield


def every_rank_seeds_for_itself():
    """Hidden states that all tensor ranks hold are dropped apart."""
    return patch.object(
        RandomStreams, "seed", lambda self, seed, groups: torch.manual_seed(seed + groups.world.rank) and None
    )


def recompute_draws_other_masks():
    right = torch.utils.checkpoint.checkpoint

    def forgetful(function, *args, **options):
        return right(function, *args, **{**options, "preserve_rng_state": False})

    return patch("megatron.parallel.recompute.checkpoint", forgetful)


def gradient_norm_counts_copies():
    return patch("megatron.engine.flat.is_model_parallel_parameter", lambda parameter: True)


def document_mask_is_dropped():
    right = gpt.GPT.context

    def context(self, tokens, position_ids=None, *masks, **named_masks):
        return right(self, tokens, position_ids)

    return patch.object(gpt.GPT, "context", context)


def row_bias_is_added_by_every_rank():
    """Before the sum over the ranks instead of after it."""

    def start(self, input, *, with_bias=True):
        summand = F.linear(input, self.weight, self.bias)
        reduce = reduce_scatter_sequence if self.sequence_parallel else reduce_from_group
        return RowOutput(Scattering(reduce(summand, self.group)))

    return patch.object(RowParallelLinear, "start", start)


def heads_come_back_in_another_order():
    right = ulysses.heads_for_sequences
    return patch.object(ulysses, "heads_for_sequences", lambda whole, group: right(whole, group).flip(2))


def positions_start_anew_on_each_rank():
    """A Ulysses rank takes its first token for the first of the sequence."""
    right = gpt.Context

    def context(**fields):
        return right(**{**fields, "first_position": 0})

    return patch.object(gpt, "Context", context)


def first_stage_drops_a_micro_batch():
    """Of the last micro-batch of a step no gradient reaches the first stage."""
    from megatron.engine.pipeline import PipelineStage

    right = PipelineStage.forward

    def forward(self, x):
        is_dropped = len(self._micro_batches) == 1 and not self.is_last
        output = right(self, x)
        return output.detach().requires_grad_() if is_dropped else output

    return patch.object(PipelineStage, "forward", forward)


def padding_takes_part_in_the_softmax():
    right = gpt.masked_loss

    def loss(logits, labels, mask, *, vocab_size, group, **options):
        return right(logits, labels, mask, vocab_size=logits.shape[-1] * group.size, group=group, **options)

    return patch.object(gpt, "masked_loss", loss)


def gradients_stay_on_their_data_rank():
    return patch("deepspeed.runtime.engine.DeepSpeedEngine.allreduce_gradients", lambda self, **options: None)
