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
    """The passes over the logits of a cross entropy; what they compute is told there, in `ShardedSoftmax`."""

    overwrites = True

    def serves(self, rows_nv: Tensor) -> bool:
        """Whether these logits can be handed to the methods below."""
        reason = why_not_computed(rows_nv.dtype)
        if reason is None and rows_nv.stride(-1) != 1:
            reason = "the columns of the logits are apart in memory"
        return not falls_back("cross entropy", reason)

    def statistics(self, rows_nv: Tensor, columns_n: Tensor, num_tokens: int) -> Tensor:
        """Return highest logit, sum of exp(logit - highest) of the others and the label's logit of each row, [3, n]."""
        statistics: Tensor = _statistics(rows_nv, columns_n, num_tokens)
        return statistics

    def gradient(
        self, rows_nv: Tensor, columns_n: Tensor, log_sum_2n: Tensor, scale_n: Tensor, num_tokens: int
    ) -> Tensor:
        """Overwrite the logits with scale (exp(logit - log_sum) - [column is the label's]) and return them."""
        _gradient(rows_nv, columns_n, log_sum_2n, scale_n, num_tokens)
        return rows_nv

    def losses_and_gradient(
        self, rows_nv: Tensor, columns_n: Tensor, scale_n: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of rows of the whole vocabulary, fp32 [n], and overwrite the logits as `gradient` does."""
        return _losses_and_gradient(rows_nv, columns_n, scale_n, num_tokens), rows_nv

    def rescaled(self, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return factor x gradient, computed in fp32 and rounded once."""
        result: Tensor = _rescaled(gradient, factor, dtype)
        return result


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


def _losses_and_gradient_cuda(rows: Tensor, columns: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
    losses = _losses_fake(rows, columns, scale, num_tokens)
    columns, scale = columns.contiguous(), scale.float().contiguous()
    load_kernel("cross_entropy").loss_and_gradient(
        address(rows),
        address(columns),
        address(scale),
        address(losses),
        rows.shape[0],
        rows.stride(0),
        rows.shape[1],
        num_tokens,
        DTYPE_CODES[rows.dtype],
        *place(rows),
    )
    torch.autograd.graph.increment_version(rows)
    return losses


def _rescaled_cuda(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    gradient, factor = gradient.contiguous(), factor.float()
    result = torch.empty_like(gradient, dtype=dtype)
    load_kernel("cross_entropy").rescale(
        address(gradient),
        address(factor),
        address(result),
        gradient.numel(),
        DTYPE_CODES[gradient.dtype],
        DTYPE_CODES[dtype],
        *place(gradient),
    )
    return result


def _statistics_cpu(rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
    statistics, wide = _statistics_fake(rows, columns, num_tokens), rows[:, :num_tokens].float()
    if num_tokens == 0:
        statistics.zero_()
        statistics[0] = float("-inf")
        return statistics
    is_here = (columns >= 0) & (columns < num_tokens)
    highest, where = wide.max(dim=1, keepdim=True)
    statistics[0] = highest.squeeze(1)
    statistics[1] = (wide - highest).exp().scatter(1, where, 0.0).sum(dim=1)
    label_logits = wide.gather(1, columns.masked_fill(~is_here, 0).unsqueeze(1)).squeeze(1)
    statistics[2] = label_logits.masked_fill(~is_here, 0.0)
    return statistics


def _gradient_cpu(rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> None:
    highest, log_exp_sum = log_sum.unsqueeze(-1)
    exponents = rows[:, :num_tokens].float() - highest - log_exp_sum
    is_label = torch.arange(num_tokens, device=rows.device) == columns.unsqueeze(1)
    difference = torch.where(is_label, exponents.expm1(), exponents.exp())
    rows[:, :num_tokens] = (scale.unsqueeze(1) * difference).to(rows.dtype)
    rows[:, num_tokens:] = 0.0


def _losses_and_gradient_cpu(rows: Tensor, columns: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
    highest, others, label_logit = _statistics_cpu(rows, columns, num_tokens)
    log_sum = others.log1p()
    _gradient_cpu(rows, columns, torch.stack([highest, log_sum]), scale, num_tokens)
    return log_sum + (highest - label_logit)


def _rescaled_cpu(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient.contiguous().float() * factor).to(dtype)


def _statistics_fake(rows: Tensor, columns: Tensor, num_tokens: int) -> Tensor:
    return rows.new_empty((3, rows.shape[0]), dtype=torch.float32)


def _gradient_fake(rows: Tensor, columns: Tensor, log_sum: Tensor, scale: Tensor, num_tokens: int) -> None:
    return None


def _losses_fake(rows: Tensor, columns: Tensor, scale: Tensor, num_tokens: int) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


def _rescaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


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
_losses_and_gradient = Operator(
    "cross_entropy_with_gradient_(Tensor(a!) rows, Tensor label_columns, Tensor scale, int num_tokens) -> Tensor",
    cuda=_losses_and_gradient_cuda,
    cpu=_losses_and_gradient_cpu,
    fake=_losses_fake,
)
_rescaled = Operator(
    "rescaled_gradient(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor",
    cuda=_rescaled_cuda,
    cpu=_rescaled_cpu,
    fake=_rescaled_fake,
)
