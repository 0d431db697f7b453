"""The choice of an attention backend: by name, or the fastest that can honour the request."""

from __future__ import annotations

from megatron.config.errors import UserError
from megatron.kernels.attention.interface import AttentionBackend, AttentionRequest
from megatron.kernels.registry import find_implementations


class AttentionUnavailableError(UserError, ValueError):
    """No backend, or not the one asked for, can honour the request."""


def pick_attention(name: str, request: AttentionRequest) -> tuple[AttentionBackend, str]:
    """Return the backend called `name` (`auto`: the fastest) and the reason for it, half a sentence to print at start.

    Raises:
        AttentionUnavailableError: it cannot honour the request (`auto`: none can); the text holds every reason.
    """
    backends = find_implementations("megatron.kernels.attention", AttentionBackend)
    if name != "auto" and name not in backends:
        known = ", ".join(["auto", *sorted(backends)])
        raise AttentionUnavailableError(f"--attention-backend {name} is not known; choose one of {known}")
    reasons = {backend.name: backend.why_not(request) for backend in backends.values()}
    usable = sorted(
        (backend for backend in backends.values() if reasons[backend.name] is None),
        key=lambda backend: -backend.preference(request),
    )
    refused = "; ".join(f"{refused_name}: {reason}" for refused_name, reason in reasons.items() if reason is not None)
    if name == "auto":
        if not usable:
            raise AttentionUnavailableError(f"no attention backend can honour {_describe(request)}: {refused}")
        reason = f"the fastest that can honour {_describe(request)}: {usable[0].choose_when}"
        return usable[0], f"{reason} ({refused})" if refused else reason
    if reasons[name] is not None:
        others = " or ".join(backend.name for backend in usable) or "no other"
        raise AttentionUnavailableError(
            f"--attention-backend {name} cannot honour {_describe(request)}: {reasons[name]}; {others} can"
        )
    return backends[name], "chosen by --attention-backend"


def _describe(request: AttentionRequest) -> str:
    dtype = str(request.dtype).removeprefix("torch.")
    features = f" with {', '.join(sorted(request.features))}" if request.features else ""
    return f"{dtype} heads of {request.head_size} on {request.device_type}{features}"
