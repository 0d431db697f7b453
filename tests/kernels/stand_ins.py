"""Stand-ins for the packages of attention, with their signatures, that compute it exactly."""

import functools
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.kernels.exact_attention import exact_attend


def whole(q, k, v, causal, scale, window=0, softcap=0.0):
    """[b, s, heads, d] in and out."""
    query, key, value = (tensor.transpose(0, 1) for tensor in (q, k, v))
    output = exact_attend(query, key, value, scale=scale, causal=causal, window=window, softcap=softcap)
    return output.to(q.dtype).transpose(0, 1)


def packed(q, k, v, offsets_q, offsets_k, longest_q, longest_k, **options):
    """[tokens, heads, d] in and out."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    lengths = offsets_q.diff()
    assert longest_q == longest_k == lengths.max()
    starts = offsets_q[:-1].tolist()
    assert offsets_q[-1] == len(q)
    parts = [slice(start, start + length) for start, length in zip(starts, lengths.tolist(), strict=True)]
    return torch.cat([whole(q[None, part], k[None, part], v[None, part], **options)[0] for part in parts])


def install(monkeypatch, name, **functions):
    for place in range(1, len(name.split(".")) + 1):
        path = ".".join(name.split(".")[:place])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    module = sys.modules[name]
    for function_name, function in functions.items():
        monkeypatch.setattr(module, function_name, function, raising=False)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


class FourthPackage:
    """flash-attn-4: the two functions below its own operator.

    Attributes:
        forwards: how many there were.
        calls: dropout, which is none, and whether the same bits were asked for, of each backward.
        given: names of the arguments that each function was given, in all calls.
    """

    def __init__(self, monkeypatch):
        self.forwards = 0
        self.calls = []
        self.given = {}
        self._log_sums = []
        functions = (self._flash_attn_fwd, self._flash_attn_bwd)
        noted = {function.__name__: self._noted(function) for function in functions}
        install(monkeypatch, "flash_attn.cute.interface", **noted)

    def _noted(self, function):
        names = self.given.setdefault(function.__name__, set())

        @functools.wraps(function)
        def call(**arguments):
            names.update(arguments)
            return function(**arguments)

        return call

    def _flash_attn_fwd(
        self,
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        return_lse=False,
        out=None,
        lse=None,
    ):
        assert (cu_seqlens_k is cu_seqlens_q, max_seqlen_k) == (True, max_seqlen_q)
        assert return_lse
        self.forwards += 1
        options = (cu_seqlens_q, max_seqlen_q, causal, softmax_scale, (window_size_left, window_size_right), softcap)
        out.copy_(self._compute(q, k, v, *options))
        lse.copy_(torch.randn(lse.shape))
        self._log_sums.append(lse.clone())
        return out, lse, None, None, None

    def _flash_attn_bwd(
        self,
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
    ):
        assert any(torch.equal(lse, given) for given in self._log_sums)
        self.calls.append((0.0, deterministic))
        assert (cu_seqlens_k is cu_seqlens_q, max_seqlen_k) == (True, max_seqlen_q)
        options = (cu_seqlens_q, max_seqlen_q, causal, softmax_scale, (window_size_left, window_size_right), softcap)

        def differentiate():
            leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            output = self._compute(*leaves, *options)
            assert torch.equal(out, output)
            return torch.autograd.grad(output, leaves, dout)

        with ThreadPoolExecutor(1) as thread:  # inside of an operator there is no autograd, in another thread there is
            grads = thread.submit(differentiate).result()
        for room, grad in zip((dq, dk, dv), grads, strict=True):
            room.copy_(grad)
        return dq, dk, dv

    def _compute(self, q, k, v, offsets, longest, causal, scale, sides, softcap):
        before, after = sides
        assert after == (None if before is None else 0)
        options = {"causal": causal, "scale": scale, "window": 0 if before is None else before + 1, "softcap": softcap}
        if offsets is None:
            return whole(q, k, v, **options)
        bound, longest = longest, int(offsets.diff().max())
        assert bound >= longest  # all that the package asks of it
        return packed(q, k, v, offsets, offsets, longest, longest, **options)
