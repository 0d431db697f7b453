"""Micro-batches: samples become tokens, labels, and what end-of-document tokens ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of b samples of s tokens.

    Where sequences are divided over ranks, this rank's shard of them; masks of attention and documents stay whole.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the token that follows each.
        loss_mask: float32 [b, s], 0 where the loss does not count; None: it counts everywhere.
        position_ids: int64 [b, s]; None: 0 to s - 1.
        attention_mask: bool [b, 1, s, s], True where query (rows) may attend to key (columns); None: causal.
        document_ids: int32 [b, s], which document of its sample a token is of, when tokens are to attend inside their
            own document and no `attention_mask` was asked for; else None.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    document_ids: Tensor | None = None

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[dict[str, Any]]]:
        """Travel between processes as bytes.

        Of a tensor torch would send a handle of its memory, by a socket and with a handshake, which takes longer than
        what most of them hold. A mask of s x s is large, and goes that way.
        """
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        sent = {
            name: tensor if name == "attention_mask" else tensor.numpy()
            for name, tensor in tensors.items()
            if tensor is not None
        }
        return _received, (sent,)

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device, without waiting for the copy where the batch is in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy to pinned memory: a torch `DataLoader` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items() if tensor is not None})


def _received(sent: dict[str, Any]) -> Batch:
    return Batch(**{name: torch.as_tensor(value) for name, value in sent.items()})


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How samples become a batch: the flags of the same names.

    Attributes:
        eod_id: the end-of-document token; needed by the three choices that follow.
        reset_position_ids: positions start anew after each end-of-document token.
        reset_attention_mask: tokens attend inside their own document only.
        eod_mask_loss: no loss where the input is an end-of-document token.
        dense_mask: give the attention mask as [b, 1, s, s] instead of document ids.
        vocab_size: refuse ids from here on; None: take all.
        positions: of each sample keep only the tokens at these positions, this rank's shard of the sequence, with their
            labels, loss mask and position ids; what attention reads stays whole. None: keep all.
    """

    eod_id: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    dense_mask: bool = False
    vocab_size: int | None = None
    positions: range | None = None

    def __post_init__(self) -> None:
        """Refuse a choice that needs an end-of-document token when there is none."""
        wanted = [
            name for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss") if getattr(self, name)
        ]
        if wanted and self.eod_id is None:
            raise DataError(
                f"--{wanted[0].replace('_', '-')} needs an end-of-document token, and the tokenizer has none: "
                f"leave the flag out or choose another tokenizer."
            )


def make_batch(samples: Sequence[npt.NDArray[np.int64]], options: BatchOptions) -> Batch:
    """Stack samples, each int64 [s + 1], into a batch on the host.

    The end-of-document token is of the document that it ends: the next token is at position 0 of the next document.
    It is the same as in Megatron's `get_ltor_masks_and_position_ids`, without its loop over documents.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    stacked = np.stack(samples)
    _check_ids(stacked, options.vocab_size)
    tokens = stacked[:, :-1]
    loss_mask = position_ids = attention_mask = document_ids = None
    if options.eod_mask_loss:
        loss_mask = torch.from_numpy((tokens != options.eod_id).astype(np.float32))
    if options.reset_position_ids:
        position_ids = torch.from_numpy(_positions(_begins(tokens, options.eod_id)))
    if options.reset_attention_mask:
        document_ids = torch.from_numpy(_begins(tokens, options.eod_id).cumsum(axis=1, dtype=np.int32))
        if options.dense_mask:
            attention_mask, document_ids = _dense_mask(document_ids), None
    first, end = (
        (0, tokens.shape[1]) if options.positions is None else (options.positions[0], options.positions[-1] + 1)
    )
    return Batch(
        tokens=torch.from_numpy(tokens[:, first:end].copy()),
        labels=torch.from_numpy(stacked[:, 1 + first : 1 + end].copy()),
        loss_mask=None if loss_mask is None else loss_mask[:, first:end].contiguous(),
        position_ids=None if position_ids is None else position_ids[:, first:end].contiguous(),
        attention_mask=attention_mask,
        document_ids=document_ids,
    )


def _check_ids(samples: npt.NDArray[np.int64], vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    lowest, highest = int(samples.min()), int(samples.max())
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"the data holds the token id {lowest if lowest < 0 else highest}, and the vocabulary has {vocab_size} "
            f"ids: train with the tokenizer that the data was made with."
        )


def _begins(tokens_bs: npt.NDArray[np.int64], eod_id: int | None) -> npt.NDArray[np.bool_]:
    """Mark the tokens that follow an end-of-document token: [b, s]."""
    begins = np.zeros(tokens_bs.shape, np.bool_)
    begins[:, 1:] = tokens_bs[:, :-1] == eod_id
    return begins


def _positions(begins_bs: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count from 0 from each beginning: int64 [b, s]."""
    place = np.arange(begins_bs.shape[1], dtype=np.int64)
    return place - np.maximum.accumulate(np.where(begins_bs, place, 0), axis=1)


def _dense_mask(document_ids_bs: Tensor) -> Tensor:
    """Allow a token the tokens up to itself of its own document: bool [b, 1, s, s]."""
    same = document_ids_bs[:, :, None] == document_ids_bs[:, None, :]
    return same.tril_()[:, None]
