"""A transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.kernels.attention.interface import AttentionBackend
from megatron.model.attention import Attention
from megatron.model.context import Context
from megatron.model.mlp import MLP
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.groups import Group


class Block(nn.Module):
    """Hidden plus attention of norm of hidden; that plus MLP of its norm."""

    def __init__(
        self, config: ModelConfig, *, layer: int, group: Group, backend: AttentionBackend, rotary: Rotary | None
    ) -> None:
        super().__init__()
        self.attention_norm = Norm(config, config.hidden_size)
        self.attention = Attention(config, layer=layer, group=group, backend=backend, rotary=rotary)
        self.mlp_norm = Norm(config, config.hidden_size)
        self.mlp = MLP(config, group=group)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[s, b, h] to [s, b, h], in the dtype of the residual stream."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), context))
        hidden = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden
