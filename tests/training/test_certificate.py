"""What a certificate calls equal: bounds, copies, missing parameters, and numbers that are none."""

import math

import pytest
import torch

from megatron.parallel.mesh import Coordinates
from megatron.parallel.sharding import Sharding
from megatron.training.certificate import Certificate, Finding, Trained, compare
from megatron.training.recorded_run import Held, Record

WHOLE = Sharding(logical_shape=(4, 2), dim=None)
START = torch.arange(8.0).reshape(4, 2)
GRADIENT = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0], [2.0, 1.0]])


def record(gradient, *, tensor=0, sharding=WHOLE, loss=2.0, start=START, name="weight"):
    held = start if sharding is WHOLE else start.chunk(2)[tensor]
    own = gradient if sharding is WHOLE else gradient.chunk(2)[tensor]
    return Record(
        coordinates=Coordinates(0, 0, 0, tensor),
        losses=[loss],
        grad_norms=[1.0],
        initial={name: Held(held, sharding)},
        final={name: Held(held - own, sharding)},
        learning_rate=1.0,
    )


def trained(*args, **options):
    one = record(*args, **options)
    return Trained(gradient=one, training=one)


def certificate(*ranks, precision="fp32", same=None, exact=None):
    exact = exact or trained(GRADIENT)
    return Certificate(findings=list(compare(precision, list(ranks), same or exact, exact)))


def test_a_layout_that_is_one_rank_s_is_equal():
    found = certificate(trained(GRADIENT))
    assert found.equal
    assert [one.what for one in found.findings] == ["loss", "gradient norm", "start", "gradient", "travel"]
    assert max(one.severity for one in found.findings) == 0


def test_shards_are_joined_before_they_are_compared():
    halves = Sharding(logical_shape=(4, 2), dim=0, num_shards=2)
    assert certificate(*(trained(GRADIENT, tensor=rank, sharding=halves) for rank in (0, 1))).equal
    swapped = certificate(*(trained(GRADIENT.flip(0), tensor=rank, sharding=halves) for rank in (0, 1)))
    assert swapped.differing("gradient") == ["weight"]


def test_of_several_copies_the_worst_counts_and_is_named():
    found = certificate(trained(GRADIENT), trained(GRADIENT * 1.001, tensor=1))
    (worst,) = [one for one in found.findings if one.what == "gradient"]
    assert not worst.holds
    assert worst.where == "tensor 1"
    assert worst.error == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_what_is_no_number_is_not_equal(factor):
    found = certificate(trained(GRADIENT * factor, loss=factor))
    assert found.differing("gradient") == ["weight"]
    assert found.differing("loss") == ["step 1"]
    assert found.worst_first[0].severity == math.inf


def test_a_parameter_that_no_rank_holds_is_not_equal():
    found = certificate(trained(GRADIENT, name="other"))
    assert set(found.differing()) == {"weight"}


def test_a_start_must_agree_in_every_bit():
    start = START.clone()
    start[3, 1] = torch.nextafter(start[3, 1], torch.tensor(9.0))
    assert certificate(trained(GRADIENT, start=start)).differing("start") == ["weight"]


@pytest.mark.parametrize(("rounding", "equal"), [(0.0, False), (0.01, False), (0.02, True)])
def test_half_precision_may_be_off_by_twice_the_rounding_of_one_rank(rounding, equal):
    off = torch.zeros_like(GRADIENT)
    off[0, 0] = GRADIENT.norm()
    found = certificate(trained(GRADIENT + 0.03 * off), precision="bf16", same=trained(GRADIENT - rounding * off))
    (gradient,) = [one for one in found.findings if one.what == "gradient"]
    assert gradient.holds == equal


def test_the_worst_comes_first_and_what_differs_before_what_holds():
    def one(error, bound):
        return Finding(precision="fp32", what="gradient", name=f"{error}", error=error, bound=bound)

    found = Certificate(findings=[one(0.0, 0.0), one(0.5, 1.0), one(3.0, 1.0), one(1.0, 0.0)])
    assert [item.name for item in found.worst_first] == ["1.0", "3.0", "0.5", "0.0"]
    assert found.differing() == ["1.0", "3.0"]
