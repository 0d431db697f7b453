"""Cross entropy over one rank's columns of the logits, fused: what one pass over them tells, and their gradient.

`megatron.parallel.cross_entropy` sums over the ranks in between, and has the same in plain torch.

Legend: n tokens, v columns of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.build import load_kernel
from megatron.kernels.operator import DTYPE_CODES, Operator, address, falls_back, place, why_not_computed


class FusedSoftmax:
    """The two passes over the logits of a cross entropy; what they compute is told there, in `ShardedSoftmax`."""

    def serves(self, rows_nv: Tensor) -> bool:
        """Whether these logits can be handed to the methods below."""
        reason = why_not_computed(rows_nv.dtype)
        if reason is None and rows_nv.stride(-1) != 1:
            reason = "the columns of the logits are apart in memory"
        return not falls_back("cross entropy", reason)

    def statistics(self, rows_nv: Tensor, columns_n: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return highest logit, sum of exp(logit - highest) and the label's logit of each row, fp32 [n] each."""
        highest, exp_sum, label_logit = _statistics(rows_nv, columns_n, num_tokens)
        return highest, exp_sum, label_logit

    def gradient(
        self, rows_nv: Tensor, columns_n: Tensor, log_sum_2n: Tensor, scale_n: Tensor, num_tokens: int
    ) -> Tensor:
        """Overwrite the logits with scale (exp(logit - log_sum) - [column is the label's]) and return them."""
        _gradient(rows_nv, columns_n, log_sum_2n, scale_n, num_tokens)
        return rows_nv


def _statistics_cuda(rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
    statistics, columns = _statistics_fake(rows, columns, num_tokens), columns.contiguous()
    load_kernel("cross_entropy").statistics(
        address(rows),
        address(columns),
        address(statistics),
        rows.shape[0],
        rows.stride(0),
        rows.shape[1],
        num_tokens,
        DTYPE_CODES[rows.dtype],
        *place(rows),
    )
    return statistics


def _gradient_cuda(rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> None:
    columns, log_sum, scale = columns.contiguous(), log_sum.contiguous(), scale.float().contiguous()
    load_kernel("cross_entropy").gradient(
        address(rows),
        address(columns),
        address(log_sum),
        address(scale),
        address(rows),
        rows.shape[0],
        rows.stride(0),
        rows.stride(0),
        rows.shape[1],
        num_tokens,
        DTYPE_CODES[rows.dtype],
        *place(rows),
    )
    torch.autograd.graph.increment_version(rows)


def _statistics_cpu(rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
    statistics, wide = _statistics_fake(rows, columns, num_tokens), rows[:, :num_tokens].float()
    if num_tokens == 0:
        statistics.zero_()
        statistics[0] = float("-inf")
        return statistics
    is_here = (columns >= 0) & (columns < num_tokens)
    statistics[0] = wide.amax(dim=1)
    statistics[1] = (wide - statistics[0].unsqueeze(1)).exp().sum(dim=1)
    label_logits = wide.gather(1, columns.masked_fill(~is_here, 0).unsqueeze(1)).squeeze(1)
    statistics[2] = label_logits.masked_fill(~is_here, 0.0)
    return statistics


def _gradient_cpu(rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> None:
    highest, log_exp_sum = log_sum.unsqueeze(-1)
    softmax = (rows[:, :num_tokens].float() - highest - log_exp_sum).exp()
    is_label = torch.arange(num_tokens, device=rows.device) == columns.unsqueeze(1)
    rows[:, :num_tokens] = (scale.unsqueeze(1) * (softmax - is_label.float())).to(rows.dtype)
    rows[:, num_tokens:] = 0.0


def _statistics_fake(rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
    return rows.new_empty((3, rows.shape[0]), dtype=torch.float32)


def _gradient_fake(rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> None:
    return None


_statistics = Operator(
    "cross_entropy_statistics(Tensor rows, Tensor label_columns, int num_tokens) -> Tensor",
    cuda=_statistics_cuda,
    cpu=_statistics_cpu,
    fake=_statistics_fake,
)
_gradient = Operator(
    "cross_entropy_gradient_(Tensor(a!) rows, Tensor label_columns, Tensor log_sum, Tensor scale, int num_tokens)"
    " -> ()",
    cuda=_gradient_cuda,
    cpu=_gradient_cpu,
    fake=_gradient_fake,
)
