import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron.data.errors import DataError, DataTimeoutError
from megatron.data.index_cache import IndexCache

DESCRIPTION = {"seed": 1}
ARRAYS = {"numbers": np.arange(7, dtype=np.int32)}


def lock_of(folder):
    """The name of the lock of DESCRIPTION's entry."""
    cache = IndexCache(folder)
    cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
    [entry] = folder.iterdir()
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    return entry.with_suffix(".lock")


def hold(lock, *, host=None, pid=None, age_s=0.0):
    """Write a lock as another process would."""
    holder = {"host": host or os.uname().nodename, "pid": pid or os.getpid(), "who": "rank 7"}
    lock.write_text(json.dumps({**holder, "since": time.time() - age_s}))


def dead_process():
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_an_entry_is_built_once_and_then_read_as_it_was(tmp_path):
    calls = []

    def build():
        calls.append(1)
        return ARRAYS

    for _ in range(3):
        loaded = IndexCache(tmp_path).load_or_build(DESCRIPTION, ["numbers"], build)
        assert loaded["numbers"].tolist() == list(range(7))
        assert loaded["numbers"].dtype == np.int32
        assert not loaded["numbers"].flags.writeable
    assert len(calls) == 1
    [entry] = tmp_path.iterdir()
    assert json.loads((entry / "description.json").read_text()) == DESCRIPTION


def test_another_description_is_another_entry(tmp_path):
    for seed in (1, 2):
        IndexCache(tmp_path).load_or_build({"seed": seed}, ["numbers"], lambda: ARRAYS)
    assert len(list(tmp_path.iterdir())) == 2


def build_slowly(folder, builds, answers, number):
    def build():
        builds.put(number)
        time.sleep(0.4)
        return ARRAYS

    cache = IndexCache(folder, timeout_s=30, who=f"rank {number}")
    answers.put(cache.load_or_build(DESCRIPTION, ["numbers"], build)["numbers"].tolist())


def check_that_one_of_several_processes_builds(folder):
    context = multiprocessing.get_context("fork")
    builds, answers = context.Queue(), context.Queue()
    processes = [context.Process(target=build_slowly, args=(folder, builds, answers, i)) for i in range(6)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=20) for _ in processes] == [list(range(7))] * 6
    for process in processes:
        process.join()
    builds.get(timeout=5)
    assert builds.empty()
    assert len(list(folder.iterdir())) == 1  # the entry: no lock is left


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    check_that_one_of_several_processes_builds(tmp_path)


def test_the_lock_of_a_dead_process_is_taken_over_with_a_sentence(tmp_path):
    lock = lock_of(tmp_path)
    pid = dead_process()
    hold(lock, pid=pid)
    said = []
    cache = IndexCache(tmp_path, timeout_s=60, who="rank 2", note=said.append)
    assert cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)["numbers"].tolist() == list(range(7))
    assert len(said) == 1
    assert f"left by rank 7 (process {pid} on {socket.gethostname()}), which holds it since" in said[0]
    assert not lock.exists()


def test_an_old_lock_of_another_machine_is_taken_over(tmp_path):
    hold(lock_of(tmp_path), host="elsewhere", age_s=100)
    said = []
    cache = IndexCache(tmp_path, timeout_s=60, note=said.append)
    cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
    assert "elsewhere" in said[0]


def test_many_processes_take_a_dead_lock_over_and_one_builds(tmp_path):
    lock = lock_of(tmp_path)
    hold(lock, pid=dead_process())
    check_that_one_of_several_processes_builds(tmp_path)
    assert not lock.exists()


def test_the_time_out_says_who_waits_for_what_held_by_whom_since_when(tmp_path):
    lock = lock_of(tmp_path)
    hold(lock)
    year = time.strftime("%Y-")
    with pytest.raises(DataTimeoutError) as refusal:
        IndexCache(tmp_path, timeout_s=0.2, who="rank 3").load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
    sentence = str(refusal.value)
    for part in (
        "rank 3 waited",
        str(lock.with_suffix("")),
        "rank 7",
        f"process {os.getpid()} on",
        year,
        f"delete {lock}",
    ):
        assert part in sentence
    assert "--data-cache-timeout-minutes" in sentence
    assert lock.exists()


def test_an_empty_lock_is_waited_for_and_then_taken_over(tmp_path):
    lock = lock_of(tmp_path)
    lock.touch()
    said = []
    IndexCache(tmp_path, timeout_s=0.3, note=said.append).load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
    assert "wrote no name" in said[0]


def test_a_build_that_fails_leaves_neither_lock_nor_entry(tmp_path):
    def build():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        IndexCache(tmp_path).load_or_build(DESCRIPTION, ["numbers"], build)
    assert list(tmp_path.iterdir()) == []


def test_a_builder_killed_while_it_writes_leaves_no_entry(tmp_path):
    code = (
        "import os, sys, numpy as np\n"
        "from megatron.data.index_cache import IndexCache\n"
        "np.save = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "IndexCache(sys.argv[1]).load_or_build({'seed': 1}, ['numbers'], lambda: {'numbers': np.arange(7)})\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    said = []
    cache = IndexCache(tmp_path, note=said.append)
    assert cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)["numbers"].tolist() == list(range(7))
    assert "is gone" in said[0]


def test_a_damaged_entry_is_named(tmp_path):
    cache = IndexCache(tmp_path)
    cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
    [entry] = tmp_path.iterdir()
    (entry / "numbers.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(DataError, match=f"the sample index {entry} is damaged .*delete that folder"):
        cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)


def test_an_entry_with_pickled_objects_is_refused(tmp_path):
    cache = IndexCache(tmp_path)
    cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
    [entry] = tmp_path.iterdir()
    np.save(entry / "numbers.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="damaged"):
        cache.load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache-path"):
        IndexCache(tmp_path / "file" / "cache").load_or_build(DESCRIPTION, ["numbers"], lambda: ARRAYS)
