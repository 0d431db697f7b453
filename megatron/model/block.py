"""A transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron.config.model import ModelConfig
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
    ) -> None:
        super().__init__()
        shards = group.sequence_shards(sequence_parallel)
        self.attention_norm = Norm(config, config.hidden_size, shards=shards)
        self.attention = Attention(
            config, layer=layer, group=group, attend=attend, rotary=rotary, sequence_parallel=sequence_parallel
        )
        self.mlp_norm = Norm(config, config.hidden_size, shards=shards)
        self.mlp = MLP(config, group=group, sequence_parallel=sequence_parallel)
        self.dropout = HiddenDropout(config.hidden_dropout, shards=shards)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[s, b, h] to [s, b, h], in the dtype of the residual stream."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), context))
        hidden = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden
