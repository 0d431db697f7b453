"""Neither way holds the model: the memory of a conversion is about one file of it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.convert.hugging_face.models import SIZES, write_model

pytest.importorskip("transformers")

MIB = 2**20
SHARD = 16 * MIB

MEASURE = """
    import sys, threading, time
    from pathlib import Path
    from megatron.checkpoint import whole
    from megatron.checkpoint.fragments import open_tensors
    from megatron.convert.hugging_face.exporting import export_model
    from megatron.convert.hugging_face.importing import import_model

    def private():  # what the process holds itself; pages of files that it has mapped can go at any time
        lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(lines["RssAnon"].split()[0]) * 1024

    def peak(work):
        done, most = threading.Event(), [private()]
        def watch():
            while not done.is_set():
                most[0] = max(most[0], private())
                time.sleep(0.0005)
        watcher = threading.Thread(target=watch)
        watcher.start()
        before = private()
        result = work()
        done.set()
        watcher.join()
        return most[0] - before, result

    theirs, ours, small, again, shard = (*map(Path, sys.argv[1:5]), int(sys.argv[5]))
    whole.LARGEST_FILE = shard
    whole.write_checkpoint.__kwdefaults__["largest_file"] = shard
    warm = import_model(small, ours / "small")
    export_model(open_tensors(warm.path), again / "small", model=warm.model, data=warm.data)
    inward, made = peak(lambda: import_model(theirs, ours / "large"))
    outward, _ = peak(lambda: export_model(
        open_tensors(made.path), again / "large", model=made.model, data=made.data, max_shard_bytes=shard))
    print(inward, outward, 4 * made.num_parameters)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_peak_memory_is_about_one_file(tmp_path, monkeypatch):
    small = write_model(tmp_path / "small", "llama 2")
    sizes = {**SIZES, "num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4000}
    monkeypatch.setitem(write_model.__globals__["VARIANTS"], "large", ("LlamaConfig", sizes))
    large = write_model(tmp_path / "large", "large", max_shard_size=f"{SHARD // MIB}MB")
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(MEASURE),
        large,
        tmp_path / "ours",
        small,
        tmp_path / "again",
        SHARD,
    ]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    inward, outward, size = map(int, ran.stdout.split())
    assert size > 6 * SHARD
    assert inward < 2.5 * SHARD, json.dumps([inward, outward, size])
    assert outward < 2.5 * SHARD, json.dumps([inward, outward, size])
