"""Does a layout train the model that one rank trains? What was compared, how far it was off, and how far it may be.

An error is a 2-norm relative to that of the one-rank run in fp32; of a parameter that several ranks hold, the worst
copy counts. With u the rounding of the precision (2^-24 for fp32, 2^-9 for bf16, 2^-12 for fp16), g_p the gradient of a
parameter and g that of all, the bounds are

| what       | in fp32                               | in half precision                          |
|------------|---------------------------------------|--------------------------------------------|
| loss       | 1e-5                                  | max(2 e, 4 u)                              |
| norm       | 1e-5                                  | max(2 e, 2 e_g, 4 u)                       |
| gradient   | 1e-5 + 4 u |g| / |g_p|                | max(2 e, u) + u |g| / (4 |g_p|)            |
| travel     | k 1e-5 + u (|w_p| + 256 d_p) / |t_p|  | max(2 e, u) + u (|w_p| + 8 d_p) / |t_p|    |
| start      | 0: bit for bit as on one rank         | 0: in the same precision                   |

with e the error of one rank in that precision (4 e where e is above 1/2, for what is rounding alone), and e_g that of
its first gradient as a whole: a norm is off by up to the length of the gradient's error, and by less when parts of it
happen to cancel, on which no bound can rely. A travel t_p is how far a weight w_p went in all k optimizer steps, and
d_p how far it would have gone at the average over all entries. The second terms are for gradients that cancel, such as
those of keys' biases, and for travels of which a weight holds only the first digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron.parallel.mesh import AXES, Coordinates
from megatron.parallel.sharding import join_shards
from megatron.training.recorded_run import Held, Record

BOUND = 1e-5
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12, "fp8": 2.0**-9}
ROUNDING_ALONE = 0.5
"""An error of one rank from which on nothing but rounding is compared with rounding."""

CANCELLED_GRADIENT = {"fp32": 4.0, "bf16": 0.25, "fp16": 0.25, "fp8": 0.25}
"""What may be left of a gradient that cancels, in u |g|: products of half precision are summed in fp32."""

CANCELLED_TRAVEL = {"fp32": 256.0, "bf16": 8.0, "fp16": 8.0, "fp8": 8.0}
"""How far such a gradient may move a weight, in u d_p: more, since Adam divides it by its own size."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number of the layout beside that of one rank.

    Attributes:
        precision: of the layout's run.
        what: kind of number: "loss", "gradient norm", "gradient", "start", "travel", "random stream", "recompute".
        name: of the parameter, the step or the module.
        error: see the module.
        bound: what the error may be.
        where: which copy of several is the worst, or what was seen.
    """

    precision: str
    what: str
    name: str
    error: float
    bound: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound; what is not a number is not."""
        return self.error <= self.bound

    @property
    def severity(self) -> float:
        """The error in units of its bound: above 1 is too much."""
        if self.bound > 0 and math.isfinite(self.error):
            return self.error / self.bound
        return 0.0 if self.error == 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Everything that was compared.

    Attributes:
        peak_gib: memory allocated on the GPUs at most, of one rank and of each rank of the layout; empty on CPUs.
    """

    findings: list[Finding]
    peak_gib: dict[str, list[float]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether every error is within its bound."""
        return all(finding.holds for finding in self.findings)

    @property
    def worst_first(self) -> list[Finding]:
        """The findings by how far they exceed their bounds."""
        return sorted(self.findings, key=lambda finding: (finding.holds, -finding.severity))

    def differing(self, what: str | None = None) -> list[str]:
        """Name what is not equal, worst first: of one kind, or of all."""
        return [found.name for found in self.worst_first if not found.holds and what in (None, found.what)]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The two runs of one rank in one precision: a step that shows gradients, and steps of the user's optimizer."""

    gradient: Record
    training: Record


def compare(precision: str, ranks: Sequence[Trained], same: Trained, exact: Trained) -> Iterator[Finding]:
    """Compare a layout with one rank.

    Args:
        precision: of the layout's runs.
        ranks: the runs of all ranks of the layout.
        same: the runs of one rank in the same precision.
        exact: the runs of one rank in fp32; `same`, where that is the precision.
    """
    comparison = _Comparison(precision)
    gradients, training = [rank.gradient for rank in ranks], [rank.training for rank in ranks]
    numbers: dict[str, Callable[[Record], list[float]]] = {
        "loss": lambda record: record.losses,
        "gradient norm": lambda record: record.grad_norms,
    }
    rounding = {"loss": 0.0, "gradient norm": _whole_error(same.gradient.gradients(), exact.gradient.gradients())}
    for what, of in numbers.items():
        yield from comparison.numbers(
            what, [of(rank) for rank in training], of(same.training), of(exact.training), rounding=rounding[what]
        )
    yield from comparison.starts([record.initial for record in training], training, same.training.initial)
    yield from comparison.gradients(
        _copies([record.gradients() for record in gradients], gradients),
        _whole(same.gradient.gradients()),
        _whole(exact.gradient.gradients()),
    )
    yield from comparison.travels(
        _copies([record.travels() for record in training], training),
        _whole(same.training.travels()),
        _whole(exact.training.travels()),
        _whole(exact.training.final),
        num_steps=len(exact.training.losses),
    )


def compare_gradients(what: str, found: Sequence[Record], expected: Sequence[Record]) -> Iterator[Finding]:
    """Compare two runs of one layout in fp32, rank by rank; a parameter's worst rank counts."""
    places = [record.coordinates for record in found]
    errors: dict[str, dict[str, float]] = {}
    for place, one, other in zip(places, found, expected, strict=True):
        gradients = one.gradients()
        for name, wanted in other.gradients().items():
            error = relative_error(gradients[name].tensor, wanted.tensor)
            errors.setdefault(name, {})[describe_place(place, places)] = error
    for name, of_ranks in sorted(errors.items()):
        where = max(of_ranks, key=lambda rank: _finite(of_ranks[rank]))
        yield Finding(precision="fp32", what=what, name=name, error=of_ranks[where], bound=BOUND, where=where)


def describe_bounds(precision: str) -> str:
    """Say in a line what errors in this precision may be; the module says it in full."""
    unit = f"u = 2^{math.log2(UNIT_ROUNDOFF[precision]):.0f}"
    if precision == "fp32":
        return f"error/|g_p| <= 1e-5 + 4 u |g|/|g_p|, {unit}; travel: 1e-5 a step + u (|w_p| + 256 d_p)/|t_p|"
    return f"error/|g_p| <= max(2 x one rank's, u) + u |g|/4|g_p|, {unit}; travel: ... + u (|w_p| + 8 d_p)/|t_p|"


class _Comparison:
    """Errors and bounds in one precision."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.unit = UNIT_ROUNDOFF[precision]

    def numbers(
        self, what: str, ranks: Sequence[list[float]], same: list[float], exact: list[float], *, rounding: float
    ) -> Iterator[Finding]:
        """Compare a number of each step; the worst rank counts, and one rank's worst step or more is its `rounding`."""
        own = max(rounding, *(_relative(value, wanted) for value, wanted in zip(same, exact, strict=True)))
        for step, wanted in enumerate(exact):
            error = max(_relative(values[step], wanted) for values in ranks)
            yield self._finding(what, f"step {step + 1}", error, self._bound(own, 4))

    def starts(
        self, held: Sequence[Mapping[str, Held]], records: Sequence[Record], expected: Mapping[str, Held]
    ) -> Iterator[Finding]:
        """Compare the weights before the first step, bit for bit."""
        copies, wanted = _copies(held, records), _whole(expected)
        for name, weight in wanted.items():
            yield self._worst("start", name, copies.get(name, {}), weight, bound=0.0, scale=weight.norm().item() or 1.0)

    def gradients(
        self, found: Mapping[str, dict[str, Tensor]], same: Mapping[str, Tensor], exact: Mapping[str, Tensor]
    ) -> Iterator[Finding]:
        """Compare the gradients of the first step."""
        total = _total(exact)
        for name, gradient in exact.items():
            scale = gradient.norm().item() or total
            bound = self._bound(relative_error(same[name], gradient))
            bound += CANCELLED_GRADIENT[self.precision] * self.unit * total / scale
            yield self._worst("gradient", name, found.get(name, {}), gradient, bound=bound, scale=scale)

    def travels(
        self,
        found: Mapping[str, dict[str, Tensor]],
        same: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        *,
        num_steps: int,
    ) -> Iterator[Finding]:
        """Compare how far each weight went: in fp32 each of the steps may add its rounding."""
        mean = _total(exact) / math.sqrt(sum(travel.numel() for travel in exact.values()))
        for name, travel in exact.items():
            weight = weights[name].norm().item()
            scale = travel.norm().item() or weight or 1.0
            average = mean * math.sqrt(travel.numel())
            bound = self._bound(relative_error(same[name], travel), exact=num_steps * BOUND)
            bound += self.unit * (weight + CANCELLED_TRAVEL[self.precision] * average) / scale
            yield self._worst("travel", name, found.get(name, {}), travel, bound=bound, scale=scale)

    def _bound(self, own: float, units: int = 1, exact: float = BOUND) -> float:
        """Bound an error: in fp32 by `exact`, else by `own`, that of one rank, or some units of rounding."""
        if self.precision == "fp32":
            return exact
        return max((2 if own < ROUNDING_ALONE else 4) * own, units * self.unit)

    def _worst(
        self, what: str, name: str, copies: Mapping[str, Tensor], wanted: Tensor, *, bound: float, scale: float
    ) -> Finding:
        if not copies:
            return self._finding(what, name, math.inf, bound, "no rank holds it")
        errors = {where: _distance(copy, wanted) / scale for where, copy in copies.items()}
        where = max(errors, key=lambda place: _finite(errors[place]))
        return self._finding(what, name, errors[where], bound, where)

    def _finding(self, what: str, name: str, error: float, bound: float, where: str = "") -> Finding:
        return Finding(precision=self.precision, what=what, name=name, error=error, bound=bound, where=where)


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Distance of two tensors in the 2-norm, relative to the second; absolute where that is zero."""
    return _distance(value, wanted) / (wanted.norm().item() or 1.0)


def describe_place(place: Coordinates, among: Sequence[Coordinates]) -> str:
    """Name a rank by its places on those axes that have several: "data 1, tensor 0"."""
    several = [axis for index, axis in enumerate(AXES) if len({other[index] for other in among}) > 1]
    return ", ".join(f"{axis} {getattr(place, axis)}" for axis in several)


def _total(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.norm().item() ** 2 for tensor in tensors.values()))


def _whole_error(found: Mapping[str, Held], exact: Mapping[str, Held]) -> float:
    """Distance of all tensors together in the 2-norm, relative to the second."""
    apart = {name: found[name].tensor.double() - held.tensor.double() for name, held in exact.items()}
    return _total(apart) / (_total(_whole(exact)) or 1.0)


def _distance(value: Tensor, wanted: Tensor) -> float:
    if value.shape != wanted.shape:
        return math.inf
    return (value.double() - wanted.double()).norm().item()


def _relative(value: float, wanted: float) -> float:
    return _finite(abs(value - wanted) / (abs(wanted) or 1.0))


def _finite(error: float) -> float:
    """Let what is not a number be the largest of all errors."""
    return math.inf if math.isnan(error) else error


def _whole(held: Mapping[str, Held]) -> dict[str, Tensor]:
    return {name: shard.tensor for name, shard in held.items()}


def _copies(held: Sequence[Mapping[str, Held]], records: Sequence[Record]) -> dict[str, dict[str, Tensor]]:
    """Join the tensor ranks' shards: name of parameter -> place -> logical tensor, one for each copy there is."""
    places = [record.coordinates for record in records]
    lines: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(places)), key=places.__getitem__):
        lines.setdefault(places[index][:-1], []).append(index)
    copies: dict[str, dict[str, Tensor]] = {}
    for line in lines.values():
        for name, first in held[line[0]].items():
            shards = [held[index][name].tensor for index in line]
            if first.sharding.dim is None or first.sharding.num_shards == 1:
                found = {describe_place(places[index], places): held[index][name].tensor for index in line}
            else:
                where = describe_place(places[line[0]], [place._replace(tensor=0) for place in places])
                found = {where: join_shards(shards, first.sharding)}
            copies.setdefault(name, {}).update(found)
    return copies
