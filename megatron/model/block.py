"""A transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.choice import PLAIN, Kernels
from megatron.model.attention import Attention
from megatron.model.context import Context
from megatron.model.dropout import HiddenDropout
from megatron.model.mlp import MLP
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.groups import Group


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
            kernels=kernels,
        )
        self.mlp_norm = Norm(config, config.hidden_size, shards=shards, kernels=kernels)
        self.mlp = MLP(
            config, group=group, sequence_parallel=sequence_parallel, chunk_size=mlp_chunk_size, kernels=kernels
        )
        self.dropout = HiddenDropout(config.hidden_dropout, shards=shards, kernels=kernels)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[s, b, h] to [s, b, h], in the dtype of the residual stream."""
        hidden, normed = self.attention_norm.of_stream(hidden)
        with_bias = not self.dropout.adds_bias
        attended = self.attention(normed, context, with_bias=with_bias)
        if self.dropout.is_idle:  # then the sum and its norm are one operation
            hidden, normed = self.mlp_norm.add(hidden, attended)
        else:
            hidden = self.dropout(attended, hidden, None if with_bias else self.attention.output.own_bias)
            normed = self.mlp_norm(hidden)
        added = self.mlp(normed, with_bias=with_bias)
        return self.dropout(added, hidden, None if with_bias else self.mlp.down.own_bias)
