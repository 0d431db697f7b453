"""What a forward pass knows besides the tensor that flows through it.

Legend: s queries of this pass, s' keys (those in the cache included), b batch, k key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens seen so far, for each layer; filled by one forward pass after another."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        """Tokens held: the position of the next one."""
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, key_sbkd: Tensor, value_sbkd: Tensor) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values of a layer behind the earlier ones; all of them come back, [s', b, k, d].

        Raises:
            ValueError: they do not fit.
        """
        end = self.length + key_sbkd.shape[0]
        if end > self.max_length:
            raise ValueError(f"the key/value cache holds {self.max_length} tokens, {end} are needed; make a longer one")
        held = self._layers[layer]
        if held is None:
            shape = (self.max_length, *key_sbkd.shape[1:])
            held = self._layers[layer] = (key_sbkd.new_empty(shape), value_sbkd.new_empty(shape))
        keys, values = held
        keys[self.length : end] = key_sbkd
        values[self.length : end] = value_sbkd
        return keys[:end], values[:end]

    def advance(self, num_tokens: int) -> None:
        """Count a pass's tokens as held, once all layers have stored theirs."""
        self.length += num_tokens


@dataclass(frozen=True)
class Context:
    """Inputs of a forward pass that every stage may read."""

    position_ids: Tensor | None = None
    """Positions [b, s]; None: they count up from `offset`."""
    attention_mask: Tensor | None = None
    """Bool [b, 1, s, s'], True = may attend, complete: it already keeps queries from later keys, and from those before
    their window. None: causal alone."""
    documents: Any = None
    """What the attention backend reads of the documents inside of each sample; None: there is one, or a mask says."""
    cache: KeyValueCache | None = None
    first_position: int = 0
    """Position of the first token, where this rank has a later shard of the sequence."""
    halves: tuple[Context, Context] | None = None
    """Where blocks take the micro-batch in two halves: what each of them may read."""
    head_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """Computes the loss from the output head's input and weight, which then gives no logits; None: it gives them."""

    @property
    def is_constant(self) -> bool:
        """Whether a block reads the same here for every micro-batch."""
        own = (self.position_ids, self.attention_mask, self.documents, self.cache)
        return all(value is None for value in own) and all(half.is_constant for half in self.halves or ())

    @property
    def offset(self) -> int:
        """Position of the first token where no position ids say otherwise."""
        return self.cache.length if self.cache is not None else self.first_position
