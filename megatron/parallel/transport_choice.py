"""Which transport the tensor ranks have, chosen once at the start of a run."""

from __future__ import annotations

import torch

from megatron.config.errors import ConfigError
from megatron.parallel.groups import Group
from megatron.parallel.peer_copies import PeerCopies, PeerCopiesUnavailableError
from megatron.parallel.transport import Messages, Transport


def choose_transport(wish: str, group: Group, device: torch.device) -> tuple[Transport | None, str]:
    """Return the transport and half a sentence on it to print at start; all ranks of the group call it.

    Args:
        wish: --tp-comm-overlap.
        group: the tensor group, its ranks holding shards of the sequence; two ranks at least.
        device: of this rank.

    Raises:
        ConfigError: the transport that is asked for does not work here.
    """
    if wish == "none":
        return None, "collectives, which run before and after the products"
    if wish == "messages":
        return Messages(group), "messages, beside the products"
    try:
        return PeerCopies(group, device), "copies by the GPUs' copy engines, beside the products"
    except PeerCopiesUnavailableError as error:
        raise ConfigError([f"--tp-comm-overlap copies: {error}; use --tp-comm-overlap messages, or none"]) from error
