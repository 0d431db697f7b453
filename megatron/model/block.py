"""A transformer block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.attention import Attention
from megatron.model.context import Context
from megatron.model.dropout import HiddenDropout
from megatron.model.mlp import MLP
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.gradient_sums import read_together, readers_over
from megatron.parallel.groups import Group
from megatron.parallel.linear import RowOutput

Turn = Callable[[Tensor, Any, Context], tuple[Tensor, Any]]
"""Takes a residual stream and what branches off from it one turn further."""


class Block(nn.Module):
    """Hidden plus attention of norm of hidden; that plus MLP of its norm.

    With sequence parallelism hidden states are shards of the sequence, [s/t, b, h], but for the inside of attention and
    MLP, whose products gather and scatter it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layer: int,
        group: Group,
        attend: Callable[..., Tensor],
        rotary: Rotary | None,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        mlp_chunk_size: int = 0,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        shards = group.sequence_shards(sequence_parallel)
        self.attention_norm = Norm(config, config.hidden_size, shards=shards, kernels=kernels)
        self.attention = Attention(
            config,
            layer=layer,
            group=group,
            attend=attend,
            rotary=rotary,
            sequence_parallel=sequence_parallel,
            keep_gathered=keep_gathered,
            kernels=kernels,
        )
        self.mlp_norm = Norm(config, config.hidden_size, shards=shards, kernels=kernels)
        self.mlp = MLP(
            config,
            group=group,
            sequence_parallel=sequence_parallel,
            keep_gathered=keep_gathered,
            chunk_size=mlp_chunk_size,
            kernels=kernels,
        )
        self.dropout = HiddenDropout(config.hidden_dropout, shards=shards, kernels=kernels)
        self.readers = readers_over(group, self)
        """What reads parameters whose gradients sum up over the tensor ranks."""
        self._reading: Callable[[], AbstractContextManager[None]] = (
            partial(read_together, self.readers, group) if self.readers else nullcontext
        )

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[s, b, h] to [s, b, h], in the dtype of the residual stream."""
        branch: Any = None
        with self._reading():
            for turn in self.turns:
                hidden, branch = turn(hidden, branch, context)
            return self.leave(hidden, branch)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The work of a block but for `leave`, in order, cut where it would wait for other ranks."""
        return (self._enter_attention, self._project, self._attend, self._enter_mlp, self._expand, self._contract)

    def leave(self, hidden: Tensor, added: RowOutput) -> Tensor:
        """Add what the last turn has started to sum over the ranks to the residual stream."""
        return self.dropout(added.wait(), hidden, self.mlp.down.own_bias if self.dropout.adds_bias else None)

    def _enter_attention(self, hidden: Tensor, _: None, context: Context) -> tuple[Tensor, Any]:
        hidden, normed = self.attention_norm.of_stream(hidden)
        return hidden, self.attention.gather(normed)

    def _project(self, hidden: Tensor, normed: Any, context: Context) -> tuple[Tensor, Any]:
        return hidden, self.attention.project(normed)

    def _attend(self, hidden: Tensor, product: Any, context: Context) -> tuple[Tensor, Any]:
        return hidden, self.attention.attend_to(product, context, with_bias=not self.dropout.adds_bias)

    def _enter_mlp(self, hidden: Tensor, attended: Any, context: Context) -> tuple[Tensor, Any]:
        if self.dropout.is_idle:  # then the sum and its norm are one operation
            hidden, normed = self.mlp_norm.add(hidden, attended.wait())
        else:
            bias = self.attention.output.own_bias if self.dropout.adds_bias else None
            hidden = self.dropout(attended.wait(), hidden, bias)
            normed = self.mlp_norm(hidden)
        return hidden, self.mlp.gather(normed)

    def _expand(self, hidden: Tensor, normed: Any, context: Context) -> tuple[Tensor, Any]:
        return hidden, self.mlp.expand(normed)

    def _contract(self, hidden: Tensor, inner: Any, context: Context) -> tuple[Tensor, Any]:
        return hidden, self.mlp.contract(inner, with_bias=not self.dropout.adds_bias)
