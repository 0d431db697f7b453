"""LayerNorm and RMSNorm over the last dim, in plain torch.

Statistics and scaling are computed in fp32 whatever the dtypes; the result has the weight's dtype, which takes an fp32
residual stream to the dtype of the products. `weight_offset` is 1 for weights that are stored minus one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, weight_offset: float = 0.0) -> Tensor:
    """Compute (x - mean) / sqrt(variance + epsilon) x weight + bias (Ba et al. 2016)."""
    shape, dtype = weight.shape, weight.dtype
    if weight_offset:
        weight = weight + weight_offset
    if x.dtype == dtype:
        return F.layer_norm(x, shape, weight, bias, epsilon)
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), shape, weight.float(), bias, epsilon).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, weight_offset: float = 0.0) -> Tensor:
    """Compute x / sqrt(mean(x^2) + epsilon) x weight (Zhang and Sennrich 2019)."""
    shape, dtype = weight.shape, weight.dtype
    if weight_offset:
        weight = weight + weight_offset
    if x.dtype == dtype:
        return F.rms_norm(x, shape, weight, epsilon)
    return F.rms_norm(x.float(), shape, weight.float(), epsilon).to(dtype)
