"""Killed runs come back bit for bit: forty kills; `make chaos` makes two hundred."""

import pytest

from tests.faults.chaos import KINDS, chaos, plan
from tests.faults.zygote import Zygote


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with Zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_killed_runs_come_back_bit_for_bit(zygote, tmp_path, kind):
    kills = plan(kind, 4 if kind.real else 16, seed=1)
    assert chaos(zygote, tmp_path / "runs", kind, kills, seed=1) == len(kills)
