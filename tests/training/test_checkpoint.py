"""A checkpoint is complete or not there, whatever happens while it is written, and only a whole one is resumed."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.training import checkpoint
from megatron.training.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    read_checkpoint,
    read_streams,
    refuse_foreign,
)
from megatron.training.control import Control
from megatron.training.state import TrainState
from tests.ranks import run_on_ranks


class FakeEngine:
    def __init__(self, content=b"weights", rank=0):
        self.content = content
        self.rank = rank

    def save(self, directory):
        (directory / f"engine_{self.rank}.pt").write_bytes(self.content)


class FakeStreams:
    def state_dict(self):
        return {"cpu": torch.arange(3), "python": {"version": 3, "gauss": None}}


def writer(root, control=None, keep_last=0):
    return CheckpointWriter(
        root,
        config={"model": {"num_layers": 2}},
        layout={"data_parallel_size": 1},
        control=control or Control.alone(),
        streams=FakeStreams(),
        keep_last=keep_last,
    )


def save(root, *iterations, keep_last=0):
    for iteration in iterations:
        writer(root, keep_last=keep_last).save(FakeEngine(), TrainState(iteration=iteration))


def find(root):
    said = []
    return find_checkpoint(Path(root), Control.alone(), said.append), said


def tags(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_saved_checkpoint_is_found_and_read(tmp_path):
    save(tmp_path, 10)
    path, said = find(tmp_path)
    assert path == tmp_path / "step_0000010"
    assert said == []
    loaded = read_checkpoint(path)
    assert loaded.state["counters"] == TrainState(iteration=10).to_json()
    assert loaded.config == {"model": {"num_layers": 2}}
    assert torch.equal(read_streams(path, rank=0)["cpu"], torch.arange(3))
    assert find(path)[0] == path  # a checkpoint may be named itself


def test_manifest_lists_every_file(tmp_path):
    save(tmp_path, 10)
    folder = tmp_path / "step_0000010"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_folder_without_a_checkpoint_has_none(tmp_path):
    assert find(tmp_path) == (None, [])
    assert find(tmp_path / "missing") == (None, [])


def test_only_the_last_ones_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert tags(tmp_path) == ["step_0000003", "step_0000004"]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed(*args, **kwargs):
    raise KilledError


FAULT_POINTS = {
    "engine": (FakeEngine, "save", 1),
    "random streams": (torch, "save", 1),
    "state": (checkpoint, "write_json", 1),
    "config": (checkpoint, "write_json", 1),
    "hashing": (checkpoint, "_shared_digests", 1),
    "commit": (checkpoint, "_commit", 1),
    "rename": (Path, "rename", 1),
    "pointer": (Path, "replace", 2),
    "prune": (checkpoint, "_prune", 2),
    "removal": (shutil, "rmtree", 2),
}
"""Where the second save is killed, and which iteration a resume continues then: 1, or 2 where its folder was whole."""


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, point):
    save(tmp_path, 1)
    owner, name, newest = FAULT_POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KilledError):
            save(tmp_path, 2, keep_last=1)
    path, said = find(tmp_path)
    assert read_checkpoint(path).state["counters"]["iteration"] in {1, newest}
    assert said == []
    save(tmp_path, 2, 3, keep_last=1)  # the next save clears what was left behind
    assert [item.name for item in tmp_path.iterdir() if item.is_dir()] == ["step_0000003"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "step_0000009",
        "../outside",
        "/etc",
        "..",
        ".",
        ".hidden",
        "step\0",
        "x" * 200,
        "a/b",
        "step_0000001\nx",
    ],
)
def test_bad_pointer_falls_back_to_the_newest_and_says_so(tmp_path, text):
    root = tmp_path / "run"
    save(root, 1, 2)
    shutil.copytree(root / "step_0000001", tmp_path / "outside")
    (root / "latest").write_text(text)
    path, said = find(root)
    assert path == root / "step_0000002"
    assert len(said) == 1
    assert "latest" in said[0]


def test_missing_or_binary_pointer_falls_back_to_the_newest(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert find(tmp_path)[0] == tmp_path / "step_0000002"
    (tmp_path / "latest").unlink()
    assert find(tmp_path)[0] == tmp_path / "step_0000002"


def test_pointer_may_be_set_back_by_hand(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "latest").write_text("step_0000001\n")
    assert find(tmp_path) == (tmp_path / "step_0000001", [])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("file", ["engine_0.pt", "rng_00000.pt", "state.json", "config.json"])
def test_damaged_file_falls_back_to_the_checkpoint_before(tmp_path, file, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "step_0000002" / file)
    path, said = find(tmp_path)
    assert path == tmp_path / "step_0000001"
    assert len(said) == 1
    assert "step_0000002" in said[0]
    assert file in said[0]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": 3}', '{"files": {"state.json": 5}}'])
def test_damaged_manifest_falls_back_to_the_checkpoint_before(tmp_path, content):
    save(tmp_path, 1, 2)
    (tmp_path / "step_0000002" / "manifest.json").write_text(content)
    assert find(tmp_path)[0] == tmp_path / "step_0000001"


def test_no_whole_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 1)
    cut(tmp_path / "step_0000001" / "engine_0.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole"):
        find(tmp_path)


def test_run_does_not_write_among_the_checkpoints_of_another(tmp_path):
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match="up to iteration 2"):
        refuse_foreign(tmp_path, None, Control.alone())
    refuse_foreign(tmp_path, tmp_path / "step_0000001", Control.alone())
    refuse_foreign(tmp_path / "new", None, Control.alone())


def test_save_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*file/step_0000001"):
        save(tmp_path / "file", 1)


def save_and_damage(root):
    control = Control.of_world(timedelta(seconds=30))
    for iteration in (1, 2):
        writer(root, control).save(FakeEngine(rank=control.rank), TrainState(iteration=iteration))
    if control.is_first:
        flip(root / "step_0000002" / "engine_1.pt")
    control.barrier()
    said = []
    found = find_checkpoint(root, control, said.append)
    return found.name, len(said), sorted(path.name for path in found.iterdir())


def test_ranks_agree_on_the_checkpoint(tmp_path):
    names = [*(f"engine_{rank}.pt" for rank in range(3)), *(f"rng_0000{rank}.pt" for rank in range(3))]
    names = sorted([*names, "config.json", "manifest.json", "state.json"])
    expected = [("step_0000001", int(rank == 0), names) for rank in range(3)]
    assert run_on_ranks(3, save_and_damage, tmp_path) == expected


class FullDiskEngine(FakeEngine):
    def save(self, directory):
        raise RuntimeError("unexpected pos 576 vs 534\nframe #0: ...")


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step_0000002 \(\d+\.\d MiB free there\): unexpected pos 576 vs 534;"):
        writer(tmp_path).save(FullDiskEngine(), TrainState(iteration=2))
    assert find(tmp_path) == (tmp_path / "step_0000001", [])
