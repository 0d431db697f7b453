"""What else happens to a real training of two ranks: it is asked to leave while it saves, or its disk fills up."""

import signal
import subprocess
import time

import pytest

from megatron.checkpoint.find import find_checkpoint
from megatron.training.control import Control
from tests.faults.chaos import Kind, log_of
from tests.faults.zygote import Zygote

SECONDS = 240


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    with Zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


class Long(Kind):
    """The real training, too long to come to its end here."""

    @property
    def iterations(self):
        return 100_000


def newest(save):
    said = []
    return find_checkpoint(save, Control.alone(), said.append), said


@pytest.mark.parametrize("background", [False, True])
def test_run_that_is_asked_to_leave_saves_its_last_step_and_leaves_with_143(zygote, tmp_path, background):
    kind, save = Long(real=True, background=background), tmp_path / "save"
    ranks = kind.start(zygote, save, None)
    deadline = time.monotonic() + SECONDS
    while max(kind.losses(save), default=0) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in ranks:
        rank.signal(signal.SIGTERM)
    assert [rank.wait(SECONDS) for rank in ranks] == [143, 143], log_of(save)
    path, said = newest(save)
    assert path.name == f"step_{max(kind.losses(save)):07d}"
    assert said == []
    assert not list(save.glob(".*.staging"))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_run_whose_disk_fills_up_says_so_and_leaves_the_last_checkpoint(zygote, small_disk, background):
    kind, save = Long(real=True, background=background), small_disk / "save"
    save.mkdir()
    (small_disk / "filler").write_bytes(bytes(2 * 2**20))
    ranks = kind.start(zygote, save, None)
    codes = [rank.wait(SECONDS) for rank in ranks]
    log = log_of(save)
    assert codes == [2, 2], log
    assert "make room there or give --save another folder" in log
    path, said = newest(save)
    assert path is not None
    assert said == []
    assert not list(save.glob(".*.staging"))
