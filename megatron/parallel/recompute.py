"""Activation recompute: backward runs a part of the model again instead of keeping its activations.

What is recomputed, and what is kept meanwhile, are one policy:

| granularity | recomputed                                        | kept                                          |
|-------------|---------------------------------------------------|-----------------------------------------------|
| none        | nothing                                           | everything                                    |
| full        | units of blocks                                   | the input of each unit                        |
| products    | units of blocks, but for the dearest products     | the input of each unit, and a budget of bytes |
| selective   | the core of attention (Korthikanti et al. 2022)   | everything else                               |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from torch import is_grad_enabled
from torch.utils.checkpoint import checkpoint

from megatron.parallel.groups import Group
from megatron.parallel.recompute_inputs import keep_inputs
from megatron.parallel.recompute_products import ProductBudget

T = TypeVar("T")
Granularity = Literal["none", "full", "products", "selective"]
Method = Literal["uniform", "block"]


class Unit(NamedTuple):
    """Blocks `first` .. `end - 1`, which are kept, or recomputed as one."""

    first: int
    end: int
    is_recomputed: bool


@dataclass(frozen=True, kw_only=True)
class RecomputePolicy:
    """What backward computes again and where the inputs that it needs for that are kept.

    Attributes:
        granularity: see the table of this module.
        method: which blocks: "uniform", all of them in units of `num_layers`; "block", the first `num_layers` blocks,
            each a unit, while the others keep their activations.
        num_layers: see `method`.
        budget_bytes: what the products kept by one unit may take, under "products".
        unasked_products: how many of a unit's last products backward does not need; known in advance, the first step
            keeps what the others do.
        split_over: ranks that hold the same hidden states, each of which keeps a share of a unit's input; backward
            gathers them. With sequence parallelism the ranks hold different shards already: leave it alone.
        on_host: whether a unit's input waits in the host's memory.

    Raises:
        ValueError: a field contradicts another, or is out of range.
    """

    granularity: Granularity = "none"
    method: Method = "uniform"
    num_layers: int = 1
    budget_bytes: int = 0
    unasked_products: int = 0
    split_over: Group = field(default_factory=Group.alone)
    on_host: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity) or self.method not in get_args(Method):
            raise ValueError(f"there is no recompute of granularity {self.granularity!r} and method {self.method!r}")
        if self.num_layers < 1 or self.budget_bytes < 0:
            raise ValueError(f"recompute of {self.num_layers} layers with {self.budget_bytes} bytes is out of range")
        if self.budget_bytes and self.granularity != "products":
            raise ValueError(f"a budget is used by recompute of 'products' alone, not of {self.granularity!r}")
        if self.split_over.size > 1 and self.granularity == "selective":
            raise ValueError("inputs of attention differ between tensor ranks: they cannot be split over them")

    @property
    def recomputes_attention(self) -> bool:
        """Whether it is the core of attention that is to be called through `recompute`."""
        return self.granularity == "selective"

    def units(self, num_blocks: int) -> list[Unit]:
        """Cut `num_blocks` blocks, those of one pipeline stage, into units; those recomputed go through `recompute`."""
        if self.granularity in ("none", "selective"):
            return [Unit(0, num_blocks, False)]
        if self.method == "uniform":
            starts = range(0, num_blocks, self.num_layers)
            return [Unit(first, min(first + self.num_layers, num_blocks), True) for first in starts]
        recomputed = min(self.num_layers, num_blocks)
        units = [Unit(first, first + 1, True) for first in range(recomputed)]
        return units if recomputed == num_blocks else [*units, Unit(recomputed, num_blocks, False)]

    @cached_property
    def _options(self) -> dict[str, Any]:
        """What torch is told of this policy: nothing where nothing is kept, as it compiles no contexts."""
        if not self.budget_bytes:
            return {}
        return {"context_fn": ProductBudget(self.budget_bytes, unasked=self.unasked_products).contexts}


NONE = RecomputePolicy()
FULL = RecomputePolicy(granularity="full")


def recompute(function: Callable[..., T], *args: object, policy: RecomputePolicy = FULL) -> T:
    """Call `function(*args)`, keep `args` and what the policy says, and call it again when backward needs the rest.

    Dropout draws the same numbers both times. torch restores its default generators for the second call and puts them
    back after it; the streams of single ranks (`random.rank_stream`) are derived from these, so they repeat as well.
    Collectives inside are repeated too, on all ranks alike. Where autograd is off, it is a plain call. Code that
    torch.compile has translated may be recomputed, and recompute be part of such code; with kept products torch runs
    the former untranslated, and refuses the latter.

    Args:
        function: any computation that gives the same result from the same arguments and random state.
        args: tensors on the device the function draws its random numbers on, and anything else. The policy moves the
            activations among them: no leaves that want a gradient, and none that lie inside of other objects.
        policy: one object for all calls of a model; its granularity is the caller's business.
    """
    if not is_grad_enabled():
        return function(*args)
    with keep_inputs(args, policy.split_over, on_host=policy.on_host):
        # Non-reentrant, because that one nests, takes any arguments and leaves parameters' hooks alone.
        result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True, **policy._options)
    return result


def recomputed(function: Callable[..., T], policy: RecomputePolicy) -> Callable[..., T]:
    """Make the function each of whose calls is one of `function` through `recompute`, arguments by name included."""

    def call(*args: object, **options: object) -> T:
        return recompute(partial(function, **options), *args, policy=policy)

    return call
