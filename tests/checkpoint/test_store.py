"""A save is whole or leaves everything as it was, in the background as well; the last and every k-th stay."""

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from datetime import timedelta

import pytest
import torch

from megatron.checkpoint import commit, records, space
from megatron.checkpoint import store as store_module
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.find import find_checkpoint, refuse_foreign
from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.state_file import COUNTERS, read_checkpoint
from megatron.checkpoint.streams import has_streams, read_streams
from megatron.training.control import Control
from tests.checkpoint import toy
from tests.ranks import run_on_ranks


def find(root, tag=None):
    said = []
    return find_checkpoint(root, Control.alone(), said.append, tag), said


def tags(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def holds(path, iteration):
    tensors = open_tensors(path)
    tensors.check()
    return all(torch.equal(tensors.read("w", kind), toy.logical(iteration, kind)) for kind in toy.KINDS)


@pytest.mark.parametrize("background", [False, True])
def test_saved_checkpoint_is_found_and_read(tmp_path, background):
    (saved,) = toy.save(tmp_path, 10, background=background)
    path, said = find(tmp_path)
    assert path == saved.path == tmp_path / "step_0000010"
    assert said == []
    loaded = read_checkpoint(path)
    assert loaded.state["counters"] == {**dict.fromkeys(COUNTERS, 0), "iteration": 10}
    assert loaded.config == {"model": {"num_layers": 2}}
    assert holds(path, 10)
    read = read_streams(path, rank=0)
    assert torch.equal(read["cpu"], toy.streams()["cpu"])
    assert read["python"]["gauss"] is None
    assert read["python"]["version"] == 3
    assert not has_streams(path, rank=1)
    assert find(path)[0] == path  # a checkpoint may be named itself
    files = {item.name: item.stat().st_size for item in path.iterdir()}
    assert saved.num_bytes == sum(size for name, size in files.items() if "safetensors" in name)
    assert saved.seconds > 0


def test_manifest_lists_every_file_and_nothing_lies_beside_them(tmp_path):
    toy.save(tmp_path, 10)
    folder = tmp_path / "step_0000010"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000010"]


def test_files_are_on_the_disk_before_what_speaks_of_them(tmp_path, monkeypatch):
    """The order of the calls that reach the disk: it is what survives a cut of the power."""
    calls = []
    names = {}
    opened = os.open

    def noted_open(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        names[descriptor] = str(path)
        return descriptor

    def noted_sync(descriptor):
        calls.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted(name, method):
        def call(self, target):
            calls.append((name, type(self)(target).name))
            return method(self, target)

        return call

    monkeypatch.setattr(os, "open", noted_open)
    monkeypatch.setattr(os, "fsync", noted_sync)
    from pathlib import Path

    monkeypatch.setattr(Path, "rename", noted("rename", Path.rename))
    monkeypatch.setattr(Path, "replace", noted("replace", Path.replace))
    toy.save(tmp_path, 10)
    staging = next(name for call, name in calls if name.startswith(".step"))
    order = [name.replace(staging, "staging").replace(tmp_path.name, "root") for _, name in calls]
    assert order == [
        "tensors_00000_00.safetensors",
        "rng_00000.safetensors",
        "rank_00000.json.new",
        "staging",
        "rank_00000.json",
        "tensors.json",
        "state.json",
        "config.json",
        "manifest.json",
        "staging",
        "step_0000010",
        "root",
        ".latest.new",
        "latest",
        "root",
    ]


def test_the_last_ones_and_every_third_are_kept(tmp_path):
    toy.save(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert tags(tmp_path) == ["step_0000003", "step_0000006", "step_0000007", "step_0000008"]


def test_checkpoints_of_a_run_that_was_taken_back_go_before_those_that_led_here(tmp_path):
    toy.save(tmp_path, 1, 2, 3, 4)
    toy.save(tmp_path, 2, keep_last=2)
    assert tags(tmp_path) == ["step_0000001", "step_0000002"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    toy.save(tmp_path, 1, 2)
    (tmp_path / "step_0000002" / "state.json").unlink()
    toy.save(tmp_path, 3, keep_last=2)
    assert tags(tmp_path) == ["step_0000001", "step_0000003"]


def test_old_ones_stay_when_the_new_one_does_not_read_back(tmp_path, monkeypatch):
    toy.save(tmp_path, 1, keep_last=1)

    def cut(staging, target, publish=commit.publish):
        publish(staging, target)
        (target / "config.json").write_text("{")

    monkeypatch.setattr(commit, "publish", cut)
    with pytest.raises(CheckpointError, match=r"reads back otherwise: config\.json has 1 bytes"):
        toy.save(tmp_path, 2, keep_last=1)
    assert find(tmp_path) == (tmp_path / "step_0000001", [])


def test_a_checkpoint_that_is_there_already_is_replaced(tmp_path):
    toy.save(tmp_path, 1, 2)
    (tmp_path / "step_0000002" / "config.json").unlink()
    toy.save(tmp_path, 2)
    assert find(tmp_path) == (tmp_path / "step_0000002", [])
    assert tags(tmp_path) == ["step_0000001", "step_0000002"]


def test_run_does_not_write_among_the_checkpoints_of_another(tmp_path):
    toy.save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match="up to iteration 2"):
        refuse_foreign(tmp_path, None, Control.alone())
    refuse_foreign(tmp_path, tmp_path / "step_0000001", Control.alone())
    refuse_foreign(tmp_path / "new", None, Control.alone())


def test_save_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*file/step_0000001"):
        toy.save(tmp_path / "file", 1)


@pytest.mark.parametrize("background", [False, True])
def test_save_without_room_is_refused_before_it_begins(tmp_path, monkeypatch, background):
    toy.save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 5, 2**16))
    with pytest.raises(CheckpointError, match=r"needs 0\.000 GiB and .* has 0\.000 GiB free: make room there"):
        toy.save(tmp_path, 2, background=background)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]


@pytest.mark.parametrize("background", [False, True])
def test_disk_that_fills_up_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, background):
    toy.save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "write_streams", full)
    with pytest.raises(CheckpointError, match=r"step_0000002 \(\d+\.\d MiB free there\): .*No space left"):
        toy.save(tmp_path, 2, background=background)
    assert find(tmp_path) == (tmp_path / "step_0000001", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]


def mounted(folder, size):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted(folder, "512k"):
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("foreseen", [False, True])
def test_small_disk_holds_the_last_checkpoint_when_the_next_does_not_fit(small_disk, monkeypatch, background, foreseen):
    toy.save(small_disk, 1)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - 4096))
    if not foreseen:
        monkeypatch.setattr(store_module, "check_disk", lambda root, needs: None)
    sentence = "GiB free: make room" if foreseen else "No space left"
    with pytest.raises(CheckpointError, match=sentence):
        toy.save(small_disk, 2, background=background)
    assert find(small_disk) == (small_disk / "step_0000001", [])
    assert tags(small_disk) == ["step_0000001"]
    (small_disk / "filler").unlink()
    toy.save(small_disk, 2, background=background)
    assert find(small_disk) == (small_disk / "step_0000002", [])


def test_copies_without_room_on_the_host_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "available_memory", lambda: 700)
    with pytest.raises(CheckpointError, match=r"--async-save copies .* GiB to the memory of .* ranks"):
        toy.save(tmp_path, 1, background=True)
    toy.save(tmp_path, 1)


def test_memory_is_counted_for_each_host():
    needs = [space.Need(disk=0, memory=60, available=100, host=host) for host in ("a", "a", "b")]
    with pytest.raises(CheckpointError, match="memory of a, which"):
        space.check_memory(needs)
    space.check_memory(needs[1:])


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = store_module.write_streams
    monkeypatch.setattr(store_module, "write_streams", lambda *args: may_write.wait(30) and write(*args))
    store = toy.open_store(tmp_path, background=True)
    snapshot = toy.snapshot(1)
    assert store.save(snapshot) == []
    for fragment in snapshot.fragments:
        fragment.tensor.zero_()  # the next step
    assert store.poll() == []
    may_write.set()
    deadline = time.monotonic() + 30
    while not (saved := store.poll()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds(saved[0].path, 1)
    assert saved[0].stalled < saved[0].seconds
    assert store.poll() == store.finish() == []


def test_the_next_save_waits_for_the_last_and_uses_its_memory_again(tmp_path):
    store = toy.open_store(tmp_path, background=True)
    assert store.save(toy.snapshot(1)) == []
    buffers = [fragment.tensor.data_ptr() for fragment in store._under_way.snapshot.fragments]
    (first,) = store.save(toy.snapshot(2))
    assert [fragment.tensor.data_ptr() for fragment in store._under_way.snapshot.fragments] == buffers
    (second,) = store.finish()
    assert holds(first.path, 1)
    assert holds(second.path, 2)


def test_a_failure_in_the_background_reaches_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "write_fragments", lambda *args: 1 / 0)
    store = toy.open_store(tmp_path, background=True)
    store.save(toy.snapshot(1))
    with pytest.raises(CheckpointError, match=r"rank 0 cannot write the checkpoint .*division by zero"):
        poll_to_the_end(store)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    store.save(toy.snapshot(2))
    store.close()
    assert find(tmp_path) == (tmp_path / "step_0000002", [])


def poll_to_the_end(store):
    while not (saved := store.poll()):
        time.sleep(0.01)
    return saved


def save_on_ranks(root, background, failing):
    ranks = Control.of_world(timedelta(seconds=30))
    toy.save(root, 1, ranks=ranks, background=background)
    if ranks.rank == failing:
        store_module.write_streams = fail
    store = toy.open_store(root, ranks, background=background, keep_last=1)
    message = None
    try:
        store.save(toy.snapshot(2, ranks.rank, ranks.size))
        poll_to_the_end(store) if background else None
    except CheckpointError as error:
        message = str(error)
    return message, str(find_checkpoint(root, ranks, print).name), tags(root)


def fail(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_all_ranks_write_a_part_and_hear_of_the_rank_that_cannot(tmp_path, background):
    results = run_on_ranks(3, save_on_ranks, tmp_path / "good", background, None)
    assert results == [(None, "step_0000002", ["step_0000002"])] * 3
    path = tmp_path / "good" / "step_0000002"
    assert holds(path, 2)
    assert len(list(path.glob("tensors_*"))) == len(list(path.glob("rng_*"))) == 3
    for failing in (0, 2):
        root = tmp_path / f"bad_{failing}"
        results = run_on_ranks(3, save_on_ranks, root, background, failing)
        message = results[0][0]
        assert f"rank {failing} cannot write the checkpoint {root / 'step_0000002'}" in message
        assert results == [(message, "step_0000001", ["step_0000001"])] * 3


def test_a_rank_without_a_sign_of_life_ends_the_wait(tmp_path, monkeypatch):
    records.write_record(tmp_path, 0, records.Part({}))
    monkeypatch.setattr(records, "SILENT_SECONDS", 0.2)
    (tmp_path / records.alive_file(1)).touch()
    with pytest.raises(CheckpointError, match=r"^rank 1 died while it wrote$"):
        records.wait_for_records(tmp_path, range(2), 30)


def test_a_run_that_ends_with_an_error_soon_gives_up_a_rank_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "HURRIED_SECONDS", 0.2)
    (tmp_path / records.alive_file(1)).touch()
    hurried = threading.Event()
    threading.Timer(0.1, hurried.set).start()
    with pytest.raises(CheckpointError, match=r"^rank 1 died while it wrote$"):
        records.wait_for_records(tmp_path, [1], 30, hurried)


def test_a_rank_that_leaves_without_a_word_ends_the_wait_at_once(tmp_path):
    beat = records.Heartbeat(tmp_path, 0)
    beat.__enter__()
    threading.Timer(0.1, beat.__exit__, (None, None, None)).start()
    with pytest.raises(CheckpointError, match=r"^rank 0 died while it wrote$"):
        records.wait_for_records(tmp_path, [0], 30)


def test_a_rank_that_lives_and_does_not_finish_ends_the_wait_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(records, "SILENT_SECONDS", 0.2)
    with records.Heartbeat(tmp_path, 0), pytest.raises(CheckpointError, match=r"ranks \[0\] did not finish within 0.5"):
        records.wait_for_records(tmp_path, [0], 0.5)


def test_leftovers_of_killed_saves_are_cleared_by_the_next(tmp_path):
    (tmp_path / ".step_0000001.0123abcd.staging" / "folder").mkdir(parents=True)
    toy.save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000002"]


def test_what_a_run_killed_after_its_last_commit_left_is_removed_when_it_is_resumed(tmp_path):
    toy.save(tmp_path, 1, 2, 3)
    (tmp_path / ".step_0000001.removed.0123abcd.staging").mkdir()
    store = toy.open_store(tmp_path, keep_last=1)
    store.tidy(tmp_path / "step_0000002")  # taken back by hand: nothing is removed yet
    assert tags(tmp_path) == ["step_0000001", "step_0000002", "step_0000003"]
    store.tidy(tmp_path / "step_0000003")
    assert tags(tmp_path) == ["step_0000003"]
