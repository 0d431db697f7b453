"""Documents packed into one sample, as the backends want them told.

Legend: s sequence, b batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def document_bounds(ids_bs: Tensor) -> Tensor:
    """Say where the document of each token begins, and where it ends.

    Args:
        ids_bs: which document a token is of, int [b, s], not falling along s.

    Returns:
        int32 [b, 2, s]: of each token the index of its document's first token, and that after its document's last.
    """
    ids_bs = ids_bs.contiguous()
    sides = [torch.searchsorted(ids_bs, ids_bs, right=right, out_int32=True) for right in (False, True)]
    return torch.stack(sides, dim=1)


@dataclass(frozen=True)
class PackedDocuments:
    """All documents of a batch, sample after sample, as kernels for sequences of different lengths want them told.

    Attributes:
        offsets: int32 [documents + 1], where each begins among the b x s tokens, and their number.
        max_length: tokens of the longest.
    """

    offsets: Tensor
    max_length: int


def pack_documents(ids_bs: Tensor) -> PackedDocuments:
    """Count the documents of ids as for `document_bounds`. The host waits for the device: once a micro-batch."""
    begins_bs = torch.ones_like(ids_bs, dtype=torch.bool)
    begins_bs[:, 1:] = ids_bs[:, 1:] != ids_bs[:, :-1]
    begins = begins_bs.flatten().nonzero().flatten()
    offsets = torch.cat((begins, begins.new_tensor([ids_bs.numel()]))).to(torch.int32)
    return PackedDocuments(offsets=offsets, max_length=int(offsets.diff().max()))
