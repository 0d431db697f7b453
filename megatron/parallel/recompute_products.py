"""Operator-level recompute: within a budget of bytes, the products that are dearest to compute again are kept.

An operation that recompute would repeat is worth keeping by its FLOPs for each byte of its result. For a product that
is the length of the sums in it; so a transformer block keeps what comes out of its widest dimension first, and
attention once the sequence is longer than that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ATTENTION = frozenset(
    {
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
    }
)
"""torch's formulas for these know neither causality nor, in some versions, grouped heads."""


@dataclass(frozen=True)
class Product:
    """One call of an operation whose FLOPs are known, and its result."""

    result: Any
    flops: int
    num_bytes: int


class ProductBudget:
    """Chooses which products of a recomputed unit are kept.

    torch's own selective checkpointing asks for a decision at each operation, before it is known what else competes for
    the budget. Here forward holds on to all products of a unit and lets go of the less valuable ones at the unit's
    end. That costs no peak memory: backward has all of them at once when it recomputes the unit.

    Args:
        budget_bytes: what the results that one unit keeps may take.
        unasked: how many of a unit's last products recompute is expected not to come to; once a unit was recomputed,
            what it came to counts.
    """

    def __init__(self, budget_bytes: int, *, unasked: int = 0) -> None:
        self.budget_bytes = budget_bytes
        self.unasked = unasked
        self._reached: dict[int, int] = {}
        """How many products recompute came to, by how many the unit has: it stops at the last activation needed."""

    def contexts(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """Return the contexts of one unit's forward and recompute, as `torch.utils.checkpoint` wants them."""
        unit = _Unit()
        return _Hold(self, unit), _Reuse(self, unit)

    def choose(self, products: dict[int, Product], total: int) -> dict[int, Product]:
        """Keep the products with the most FLOPs a byte, earlier ones first, as far as they fit.

        Args:
            products: those that may be kept, by their number in the unit.
            total: products of the unit.
        """
        # The last ones, a block's down projection for one, are never asked for again when only a sum follows them.
        reached = self._reached.get(total, total - self.unasked)
        left, kept = self.budget_bytes, {}
        ranking = sorted(products, key=lambda n: (-products[n].flops / products[n].num_bytes, n))
        for number in ranking:
            if number < reached and products[number].num_bytes <= left:
                left -= products[number].num_bytes
                kept[number] = products[number]
        return kept

    def note_reach(self, total: int, reached: int) -> None:
        """Remember that recompute of a unit with `total` products came to `reached` of them."""
        self._reached[total] = max(reached, self._reached.get(total, 0))


@dataclass
class _Unit:
    """What forward leaves to recompute."""

    products: dict[int, Product] = field(default_factory=dict)
    total: int = 0


class _Hold(TorchDispatchMode):
    """Forward: hold every product, then choose."""

    def __init__(self, budget: ProductBudget, unit: _Unit) -> None:
        super().__init__()
        self.budget, self.unit = budget, unit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if _is_product(func):
            if not _draws_random_numbers(func, args, kwargs):
                flops = _flops(func, args, kwargs, result)
                num_bytes = sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor))
                # Detached: the tensor itself is about to be given its place in the graph, which leads back here.
                held = tree_map_only(Tensor, Tensor.detach, result)
                self.unit.products[self.unit.total] = Product(held, flops, max(num_bytes, 1))
            self.unit.total += 1
        elif self.unit.products:
            self._let_go_of(_written_by(func, args, kwargs))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.unit.products = self.budget.choose(self.unit.products, self.unit.total)

    def _let_go_of(self, written: list[Tensor]) -> None:
        """Drop products that were changed in place: recompute would be given them changed, and change them again."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in written}
        if storages:
            self.unit.products = {
                number: product
                for number, product in self.unit.products.items()
                if not any(x.untyped_storage().data_ptr() in storages for x in _tensors(product.result))
            }


class _Reuse(TorchDispatchMode):
    """Recompute: give out the kept products instead of computing them."""

    def __init__(self, budget: ProductBudget, unit: _Unit) -> None:
        super().__init__()
        self.budget, self.unit = budget, unit
        self.number = 0

    def __enter__(self) -> _Reuse:
        self.number = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_product(func):
            return func(*args, **(kwargs or {}))
        kept = self.unit.products.pop(self.number, None)
        self.number += 1
        return func(*args, **(kwargs or {})) if kept is None else kept.result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.unit.products.clear()
        self.budget.note_reach(self.unit.total, self.number)


def _is_product(func: Any) -> bool:
    """Whether the operation's FLOPs are known: products and attention, also a library's that registered a formula."""
    if not isinstance(func, OpOverload) or func._schema.is_mutable:
        return False
    return func._overloadpacket in flop_registry or func._overloadpacket in ATTENTION


def _flops(func: OpOverload, args: Any, kwargs: Any, result: Any) -> int:
    if func._overloadpacket not in ATTENTION:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
    query_bnsd, key_bksd = args[:2]
    every_pair: int = 4 * query_bnsd.numel() * key_bksd.shape[2]
    return every_pair // 2 if _arguments(func, args, kwargs).get("is_causal") else every_pair


def _draws_random_numbers(func: OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether the call advances a generator: left out of recompute, later dropout would draw other numbers."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = _arguments(func, args, kwargs)
    return bool(given.get("dropout_p", 0.0 if any(a.name == "dropout_p" for a in func._schema.arguments) else 1.0))


def _written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that the call changes in place."""
    if not isinstance(func, OpOverload):
        return []
    if func.namespace == "c10d":  # collectives write to their first argument and their schemas do not say so
        return _tensors(args[0])
    if not func._schema.is_mutable:
        return []
    given = _arguments(func, args, kwargs)
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [tensor for name in written & given.keys() for tensor in _tensors(given[name])]


def _arguments(func: OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
    """Name the arguments that the call gives."""
    return {**{a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}, **kwargs}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
