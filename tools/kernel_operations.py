"""The fused operations at the sizes of a model and what computes them elsewhere, for `benchmark_kernels.py`.

Everything is bf16. `rows` are tokens, `hidden` is the width of the model.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import Function, Operation, Tensors
from torch import Tensor

from megatron.kernels import activation, dropout, norm, rotary, softmax
from megatron.kernels.attention.mask import causal_mask
from megatron.kernels.cross_entropy import FusedSoftmax
from megatron.parallel.cross_entropy import token_losses
from megatron.parallel.groups import Group
from megatron.parallel.linear_cross_entropy import linear_cross_entropy

EPSILON = 1e-5
VOCABULARY = 50304
HEAD_SIZE = 128
LENGTH = 2048
"""Queries and keys of attention scores."""
MOST_HEADS = 64
"""Heads of all samples together: half a GB of scores."""
CHUNKS = (1024, 4096)


def has(*modules: str) -> bool:
    """Tell whether all these packages are installed."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Make random numbers on the GPU that require a gradient."""
    values = torch.randn(shape, device="cuda") * scale + shift
    return values.to(dtype).requires_grad_()


def norms(rows: int, hidden: int) -> Iterator[Operation]:
    """LayerNorm, RMSNorm, and both with the sum of the residual stream."""
    row_bytes, size = 2.0 * rows * hidden, f"{rows}x{hidden}"
    for name, centred in (("layer_norm", True), ("rms_norm", False)):
        given = {"epsilon": EPSILON, "centred": centred}

        def make(count: int, streams: int = 1, centred: bool = centred) -> Tensors:
            weights = (draw(hidden, shift=1.0, scale=0.1), *([draw(hidden, scale=0.1)] if centred else []))
            return (*(draw(count, hidden) for _ in range(streams)), *weights)

        def call(function: Function, *tensors: Tensor, given: dict[str, Any] = given) -> Any:
            bias = () if given["centred"] else (None,)
            return function(*tensors, *bias, **given)

        yield Operation(
            name=name,
            size=size,
            rows=rows,
            make=make,
            fused=functools.partial(call, norm.fused_norm),
            plain=functools.partial(call, norm.norm),
            forward_bytes=2 * row_bytes,
            backward_bytes=3 * row_bytes,
            others=other_norms(name),
        )
        yield Operation(
            name=f"add_{name}",
            size=size,
            rows=rows,
            make=functools.partial(make, streams=2),
            fused=functools.partial(call, norm.fused_add_norm),
            plain=functools.partial(call, norm.add_norm),
            forward_bytes=4 * row_bytes,
            backward_bytes=4 * row_bytes,
            others=other_norms(f"add_{name}"),
        )


def other_norms(name: str) -> dict[str, Function]:
    """Liger-Kernel's norm of that name, and apex's, where they are installed."""
    norms: dict[str, dict[str, Function]] = {}
    if has("liger_kernel"):
        from liger_kernel.ops import fused_add_rms_norm, layer_norm, rms_norm

        add_norm = fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply
        norms["liger"] = {
            "layer_norm": lambda x, w, b: layer_norm.LigerLayerNormFunction.apply(x, w, b, EPSILON),
            "rms_norm": lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, EPSILON, 0.0, "llama", False),
            "add_rms_norm": lambda x, r, w: add_norm(x, r, w, EPSILON, 0.0, "llama", False),
        }
    if has("apex", "fused_layer_norm_cuda"):
        from apex.normalization import fused_layer_norm as apex_norm

        norms["apex"] = {
            "layer_norm": lambda x, w, b: apex_norm.fused_layer_norm_affine(x, w, b, w.shape, EPSILON),
            "rms_norm": lambda x, w: apex_norm.fused_rms_norm_affine(x, w, w.shape, EPSILON),
        }
    return {library: functions[name] for library, functions in norms.items() if name in functions}


def activations(rows: int, hidden: int) -> Iterator[Operation]:
    """Yield the nonlinearities of an MLP four times as wide as the model, with a bias."""
    width = 4 * hidden
    for name in ("gelu", "gelu_tanh", "squared_relu", "swiglu"):
        inputs = width * (2 if name in activation.GATED else 1)
        others: dict[str, Function] = {}
        if name == "swiglu" and has("liger_kernel"):
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            others["liger"] = lambda x, b: LigerSiLUMulFunction.apply(*(x + b).chunk(2, dim=-1))
        yield Operation(
            name=f"bias_{name}",
            size=f"{rows}x{inputs}",
            rows=rows,
            make=lambda count, inputs=inputs: (draw(count, inputs, scale=2.0), draw(inputs)),  # type: ignore[misc]
            fused=activation.FUSED_ACTIVATIONS[name],
            plain=activation.ACTIVATIONS[name],
            forward_bytes=2.0 * rows * (inputs + width),
            backward_bytes=2.0 * rows * (2 * inputs + width),
            others=others,
        )


def rotations(rows: int, hidden: int) -> Iterator[Operation]:
    """Yield queries and keys of one product, cut out and rotated."""
    heads, batch = hidden // HEAD_SIZE, 4
    length = -(-rows // batch)
    angles = torch.outer(torch.arange(length, device="cuda").float(), torch.logspace(0, -4, HEAD_SIZE // 2).cuda())
    cosine, sine = angles.cos(), angles.sin()

    def plain(product: Tensor) -> Tensors:
        query, key, value = rotary.split_heads(product, heads, HEAD_SIZE)
        return (
            rotary.apply_rotary(query, cosine, sine),
            rotary.apply_rotary(key, cosine, sine),
            value.contiguous(),
        )

    def fused(product: Tensor) -> Tensors:
        return rotary.fused_split(product, cosine, sine, groups=heads, head_size=HEAD_SIZE)

    yield Operation(
        name="split_rotary",
        size=f"{length}x{batch}x{3 * hidden}",
        rows=length,
        make=lambda count: (draw(count, batch, 3 * hidden),),
        fused=fused,
        plain=plain,
        forward_bytes=4.0 * length * batch * 3 * hidden,
        backward_bytes=4.0 * length * batch * 3 * hidden,
    )


def dropouts(rows: int, hidden: int) -> Iterator[Operation]:
    """Bias, dropout and residual sum."""
    row_bytes = 2.0 * rows * hidden
    yield Operation(
        name="bias_dropout_add",
        size=f"{rows}x{hidden}",
        rows=rows,
        make=lambda count: (draw(count, hidden), draw(count, hidden), draw(hidden)),
        fused=lambda x, residual, bias: dropout.fused_dropout_add(x, residual, 0.1, bias),
        plain=lambda x, residual, bias: dropout.dropout_add(x, residual, 0.1, bias),
        forward_bytes=3 * row_bytes,
        backward_bytes=2 * row_bytes,
        judged_rows=None,
    )


def softmaxes(rows: int, hidden: int) -> Iterator[Operation]:
    """Softmax of attention scores: plain, under a mask of documents, causal; beside torch's own in bf16."""
    heads = min(MOST_HEADS, max(1, rows // LENGTH) * (hidden // HEAD_SIZE))
    documents = torch.arange(LENGTH, device="cuda") // 700
    mask = (documents == documents.unsqueeze(1)).tril().view(1, 1, LENGTH, LENGTH)
    score_bytes = 2.0 * heads * LENGTH * LENGTH
    seen = causal_mask(LENGTH, LENGTH, torch.device("cuda"))

    def plain(scores: Tensor, allowed: Tensor | None) -> Tensor:
        scaled = scores * 0.3
        return (scaled if allowed is None else scaled.masked_fill(~allowed, float("-inf"))).softmax(dim=-1)

    for name, given, allowed, read in (
        ("softmax", {}, None, 1.0),
        ("masked_softmax", {"mask": mask}, mask, 1.0),
        ("causal_softmax", {"causal": True}, seen, 0.5),
    ):
        yield Operation(
            name=name,
            size=f"{heads}x{LENGTH}x{LENGTH}",
            rows=heads,
            make=lambda count: (draw(1, count, LENGTH, LENGTH, scale=3.0),),
            fused=functools.partial(softmax.fused_scaled_softmax, scale=0.3, **given),
            plain=functools.partial(plain, allowed=allowed),
            forward_bytes=(read + 1) * score_bytes,
            backward_bytes=(2 * read + 1) * score_bytes,
            others=other_softmaxes(name),
            judged_rows=2,
        )


def other_softmaxes(name: str) -> dict[str, Function]:
    """Those of Liger-Kernel and apex, where they are installed."""
    found: dict[str, Function] = {}
    if name == "softmax" and has("liger_kernel"):
        from liger_kernel.ops.softmax import LigerSoftmaxFunction

        found["liger"] = lambda x: LigerSoftmaxFunction.apply(x * 0.3)
    if name == "causal_softmax" and has("apex", "scaled_upper_triang_masked_softmax_cuda"):
        from apex.transformer.functional.fused_softmax import ScaledUpperTriangMaskedSoftmax

        found["apex"] = lambda x: ScaledUpperTriangMaskedSoftmax.apply(x.flatten(0, 1), 0.3).view_as(x)
    return found


class FusedLoss(torch.autograd.Function):
    """Cross entropy of one rank by the fused passes; backward overwrites the logits, again each time it is called."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Keep the logits and one number a token."""
        loss, log_sum = token_losses(FusedSoftmax().statistics(logits, labels, logits.shape[1]))
        ctx.tensors = (logits, labels, log_sum)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Overwrite the logits."""
        logits, labels, log_sum = ctx.tensors
        return FusedSoftmax().gradient(logits.detach(), labels, log_sum, grad, logits.shape[1]), None


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's loss, in fp32 at the least."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="none")


def losses(rows: int, _: int) -> Iterator[Operation]:
    """Cross entropy over the whole vocabulary."""
    others: dict[str, Function] = {}
    if has("liger_kernel"):
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        # Its forward computes the gradient too, and divides by nothing with "sum".
        others["liger"] = lambda x, y: LigerCrossEntropyFunction.apply(x, y, None, -100, 0.0, 0.0, "sum")[0]
    yield Operation(
        name="cross_entropy",
        size=f"{rows}x{VOCABULARY}",
        rows=rows,
        make=lambda count: (draw(count, VOCABULARY, scale=3.0), torch.randint(VOCABULARY, (count,), device="cuda")),
        fused=FusedLoss.apply,
        plain=plain_loss,
        forward_bytes=2.0 * rows * VOCABULARY,
        backward_bytes=4.0 * rows * VOCABULARY,
        others=others,
    )


def head_losses(rows: int, hidden: int) -> Iterator[Operation]:
    """Yield the output head with the loss: the product and then the fused loss, and both in chunks of tokens."""

    def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain_loss(x.flatten(0, 1) @ weight.t(), labels.flatten()).sum()

    def unchunked(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = FusedLoss.apply(x.flatten(0, 1) @ weight.t(), labels.flatten()).sum()
        return loss

    def chunked(x: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        return linear_cross_entropy(
            x,
            weight,
            labels,
            None,
            group=Group.alone(),
            vocab_size=VOCABULARY,
            chunk_size=chunk_size,
            softmax=FusedSoftmax(),
        )

    others: dict[str, Function] = {}
    if has("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        others["liger"] = lambda x, w, y: LigerFusedLinearCrossEntropyFunction.apply(
            x.flatten(0, 1), w, y.flatten(), None, None, -100, 0.0, 0.0, "sum"
        )[0]
    forms = {"head_loss": unchunked}
    forms |= {f"head_loss_{size}": functools.partial(chunked, chunk_size=size) for size in CHUNKS}
    for name, fused in forms.items():
        yield Operation(
            name=name,
            size=f"{rows}x{hidden}",
            rows=rows,
            make=lambda count: (
                draw(count, 1, hidden),
                draw(VOCABULARY, hidden, scale=0.02),
                torch.randint(VOCABULARY, (count, 1), device="cuda"),
            ),
            fused=fused,
            plain=plain,
            forward_bytes=2.0 * (rows + VOCABULARY) * hidden,
            backward_bytes=2.0 * (rows + VOCABULARY) * hidden,
            flops=6.0 * rows * hidden * VOCABULARY,
            others=others,
        )


FAMILIES = (norms, rotations, activations, dropouts, softmaxes, losses, head_losses)
