"""`--verify-resume` on a GPU: a run that is killed behind its checkpoint, resumed as it was and in another layout."""

import contextlib
import io
import shutil
from dataclasses import dataclass

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, losses, run, write_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAVED, KILLED = 5, 9
MODEL = ["--hidden-size", "256", "--num-attention-heads", "4", "--precision", "bf16", "--save-interval", str(SAVED)]
EXACT = ["--attention-backend", "unfused", "--no-fused-kernels"]
"""What adds up gradients in one order always; with dropout."""
FAST = ["--async-save", "--hidden-dropout", "0", "--attention-dropout", "0"]
"""What a run takes by itself; without dropout, so that steps can be compared in another layout."""
OTHERS = [[], ["--zero-stage", "3"]]


class KilledError(Exception):
    """The process is gone."""


def kill(iteration):
    if iteration == KILLED:
        raise KilledError


@dataclass
class Resumed:
    """What came of a resume: its exit code, what it said of the verification, and its losses."""

    code: int
    said: list[str]
    losses: dict[int, str]


def resumed_runs(folder):
    """A run to its end; one that is killed, and resumed in several ways."""
    flags = [*FLAGS, *MODEL, *write_data(folder / "data")]
    found = {}
    for name, own in (("exact", EXACT), ("fast", FAST)):
        run([*flags, *own, "--save", str(folder / name)])
        found[name] = losses(folder / name)
        with pytest.raises(KilledError):
            run([*flags, *own, "--save", str(folder / f"{name} lost")], before_step=kill)
        for other in OTHERS:
            target = folder / " ".join([name, *other, "resumed"])
            shutil.copytree(folder / f"{name} lost", target)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = run([*flags, *own, *other, "--save", str(target), "--load", str(target), "--verify-resume"])
            lines = [line for line in said.getvalue().splitlines() if line.startswith((" verified", " the recorded"))]
            found[name, *other] = Resumed(code, lines, losses(target))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    on_gpu = {"backend": "nccl", "initialize": False, "deepspeed": True, "timeout": 400}
    return run_on_ranks(1, resumed_runs, folder, **on_gpu)[0]


@pytest.mark.parametrize("name", ["exact", "fast"])
@pytest.mark.parametrize("other", OTHERS, ids=["the same layout", "ZeRO-3"])
def test_a_killed_run_is_verified_in_its_own_layout_and_in_others(found, name, other):
    resumed = found[name, *other]
    print(name, *other, *resumed.said, sep="\n")
    assert resumed.code == 0
    assert "entries of weights and optimizer state are the checkpoint's, bit for bit" in resumed.said[0]
    assert "the loss of the next" in resumed.said[1]
    assert resumed.said[1].endswith("bit for bit") or other
    if other and name == "exact":
        assert resumed.said[2].endswith("cannot be compared: other masks of dropout")
    else:
        assert f"iteration {SAVED + 1} is the recorded one" in resumed.said[2]


def test_a_verified_resume_has_the_losses_of_the_run_that_nobody_killed(found):
    assert found[("exact",)].losses == found["exact"]
    straight, fast = found["fast"], found[("fast",)].losses
    print(f"{sum(fast[step] == straight[step] for step in straight)} of {len(straight)} losses equal with fast kernels")
    assert fast[SAVED + 1] == straight[SAVED + 1]
    assert [float.fromhex(fast[step]) for step in straight] == pytest.approx(
        [float.fromhex(loss) for loss in straight.values()], rel=1e-2
    )
