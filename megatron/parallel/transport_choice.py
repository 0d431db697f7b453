"""Which transport the tensor ranks have, chosen once at the start of a run."""

from __future__ import annotations

import torch

from megatron.config.errors import ConfigError
from megatron.parallel.groups import Group
from megatron.parallel.peer_copies import PeerCopies, PeerCopiesUnavailableError
from megatron.parallel.transport import Messages, Transport


def choose_transport(wish: str, group: Group, device: torch.device) -> tuple[Transport | None, str]:
    """Return the transport and the reason for it, half a sentence to print at start; all ranks of the group call it.

    Args:
        wish: --tp-comm-overlap.
        group: the tensor group, its ranks holding shards of the sequence; two ranks at least.
        device: of this rank.

    Raises:
        ConfigError: the transport that is asked for does not work here.
    """
    if wish == "none":
        return None, "none, as the flags say: collectives run before and after the products"
    if wish == "messages":
        return Messages(group), "messages, as the flags say, beside the products"
    try:
        return PeerCopies(group, device), "copies by the GPUs' copy engines, beside the products"
    except PeerCopiesUnavailableError as error:
        if wish == "copies":
            raise ConfigError(
                [f"--tp-comm-overlap copies: {error}; use --tp-comm-overlap messages, or auto, or none"]
            ) from error
        return None, f"none, as {error}: collectives run before and after the products"
