"""How a fused operation is judged: by fp64, and by plain torch in the same dtype."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron.kernels import activation, cross_entropy, dropout, fp8, norm, operator, rotary, softmax
from tests.kernels.emulated import emulated_kernel, why_not

HALF = (torch.bfloat16, torch.float16)
MODULES = (norm, activation, rotary, cross_entropy, dropout, softmax, fp8)


@contextlib.contextmanager
def kernels_on_the_cpu():
    """Within the context operators on CPU tensors run the emulated CUDA kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "load_kernel", emulated_kernel)
        patch.setattr(rotary, "goes_straight", lambda _: True)
        patch.setattr(operator, "goes_straight", lambda _: True)
        yield


@contextlib.contextmanager
def kernels_on(device: str):
    """Run fused operations on `device` by their CUDA kernels: those of the GPU, or emulated ones."""
    if device == "cpu":
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        with kernels_on_the_cpu():
            yield
    else:
        yield


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]):
    """Return results and gradients of `function(*inputs)`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    given = [grad.to(result.dtype) for grad, result in zip(grads, out, strict=True)]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, given)]


def check_against_fp64(fused, plain, inputs, grads, *, slack: float = 1.1) -> None:
    """Check that `fused` and its gradients are no farther from fp64 than `plain` and its own, and repeat in bits."""
    exact = gradients(plain, [x.double() for x in inputs], [x.double() for x in grads])
    given = gradients(plain, inputs, grads)
    actual = gradients(fused, inputs, grads)
    again = gradients(fused, inputs, grads)
    for number, (a, b, g, e) in enumerate(zip(actual, again, given, exact, strict=True)):
        assert a.shape == e.shape
        assert a.dtype == g.dtype
        assert torch.equal(a, b), f"tensor {number} differs between two runs"
        resolution = torch.finfo(a.dtype).eps
        error, allowed = relative_error(a, e), slack * relative_error(g, e) + resolution / 20
        if a.dtype == torch.float32:
            allowed += 4e-7
        assert error <= allowed, f"tensor {number}: {error:.3g} from fp64, plain torch {relative_error(g, e):.3g}"
