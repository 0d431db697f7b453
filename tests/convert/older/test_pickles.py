"""Files of the older systems are read without running what they name, and damage is named."""

import argparse
import builtins
import io
import os
import pathlib
import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from megatron.checkpoint.errors import CheckpointError
from megatron.convert.older.importing import ImportOptions, import_checkpoint
from megatron.convert.older.pickles import plain, read_pickled
from megatron.convert.older.zero_partitions import Partition
from tests.convert.older.engine_writer import write_flat_engine
from tests.convert.older.older_writer import Layout, make_original, write_megatron_lm
from tests.convert.older.test_importing import GPT_2


class Payload:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Exist, so that pickle takes a payload for what another one calls."""


def payloads(sentinel):
    """Ways to leave a trace, by what the pickle names."""
    script = f"open({str(sentinel)!r}, 'w')"
    return {
        "system": Payload(os.system, f"touch {sentinel}"),
        "popen": Payload(os.popen, f"touch {sentinel}"),
        "subprocess": Payload(subprocess.check_call, ["touch", str(sentinel)]),
        "eval": Payload(eval, script),
        "exec": Payload(exec, script),
        "open": Payload(open, str(sentinel), "w"),
        "io.open": Payload(io.open, str(sentinel), "w"),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "touch": Payload(pathlib.Path.touch, pathlib.PosixPath(sentinel)),
        "member": Payload(Payload(getattr, pathlib.PosixPath, "touch"), pathlib.PosixPath(sentinel)),
        "partial": Payload(builtins.map, os.mkdir, [str(sentinel)]),
        "load": Payload(torch.load, str(sentinel)),
        "hub": Payload(torch.hub.load, "owner/repository", "model"),
        "numpy": Payload(np.save, str(sentinel), np.zeros(1)),
    }


@pytest.mark.parametrize("kind", sorted(payloads("x")))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_payload_is_refused_by_name_and_not_run(tmp_path, kind, zipped):
    sentinel = tmp_path / "was_run"
    path = tmp_path / "model_optim_rng.pt"
    content = {"model": {"weight": torch.ones(2)}, "args": payloads(sentinel)[kind]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing of it was run") as refusal:
        read_pickled(path)
    assert str(path) in str(refusal.value)
    assert not sentinel.exists()


def test_a_payload_under_an_admitted_name_is_not_run_either(tmp_path):
    sentinel = tmp_path / "was_run"
    torch.save({"args": Payload(os.system, f"touch {sentinel}")}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"posix\.system, of a module that runs programs"):
        read_pickled(tmp_path / "file.pt", admitted=["posix.system"])
    torch.save({"args": Payload(subprocess.check_call, ["touch", str(sentinel)])}, tmp_path / "file.pt")
    # Pickle's second protocol, which torch writes, calls modules by their names in Python 2.
    content = read_pickled(tmp_path / "file.pt", admitted=["commands.check_call"])
    assert content["args"].arguments == (["touch", str(sentinel)],)
    assert not sentinel.exists()


def test_what_the_older_systems_pickled_beside_tensors_is_read(tmp_path):
    content = {
        "args": argparse.Namespace(hidden_size=8, params_dtype=torch.bfloat16, save=pathlib.PosixPath("/x")),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "scalar": np.float64(2.0),
        "extra": io.BytesIO(b"abc"),
        "model": {"weight": torch.arange(6.0).view(2, 3)},
    }
    torch.save(content, tmp_path / "file.pt")
    read = read_pickled(tmp_path / "file.pt")
    assert plain(read["args"])["hidden_size"] == 8
    assert plain(read["args"])["params_dtype"] == torch.bfloat16
    assert torch.equal(read["model"]["weight"], content["model"]["weight"])


def test_a_member_of_an_enumeration_is_a_record_whichever_python_pickled_it(tmp_path):
    content = {"number": Payload(signal.Signals, 15), "name": Payload(getattr, signal.Signals, "SIGTERM")}
    torch.save(content, tmp_path / "file.pt")
    read = read_pickled(tmp_path / "file.pt")
    assert read["number"].arguments == (15,)
    assert read["name"].arguments[0].pickled_as == "signal.Signals"
    assert read["name"].arguments[1] == "SIGTERM"


def test_the_stage_of_partitions_is_read_whichever_python_pickled_it(tmp_path):
    content = {"number": Payload(ZeroStageEnum, 2), "name": Payload(getattr, ZeroStageEnum, "gradients"), "plain": 2}
    torch.save(content, tmp_path / "file.pt")
    read = read_pickled(tmp_path / "file.pt")
    assert [Partition(tmp_path, 0, {"zero_stage": read[key]}).stage for key in content] == [2, 2, 2]


def test_a_file_of_the_oldest_form_is_read(tmp_path):
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickled(tmp_path / "file.pt")["model"]["weight"], torch.ones(2))


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_was_cut_off_is_named(tmp_path, kept, zipped):
    path = tmp_path / "file.pt"
    torch.save({"model": {"weight": torch.randn(1000)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=str(path)):
        read_pickled(path)


def test_a_file_that_holds_no_dictionary_is_named(tmp_path):
    torch.save(torch.ones(2), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"holds a Tensor instead of a dictionary"):
        read_pickled(tmp_path / "file.pt")


@pytest.mark.parametrize("write", ["ranks", "zero-1", "zero-3"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_each_file_of_a_checkpoint_is_missed(tmp_path, write, damage):
    original = make_original(GPT_2)
    if write == "ranks":
        folder = write_megatron_lm(original, tmp_path / "old", Layout(tensor=2, pipeline=2))
    else:
        folder = write_flat_engine(original, tmp_path / "old", Layout(tensor=2, data=2), int(write[-1]))
    files = sorted(folder.glob("*/**/*.pt"))
    assert len(files) > 3
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2]) if damage == "cut" else file.unlink()
        with pytest.raises(CheckpointError) as error:
            import_checkpoint(folder, tmp_path / "new", ImportOptions())
        assert str(file if damage == "cut" else folder) in str(error.value)
        assert not (tmp_path / "new" / "latest").exists()
        file.write_bytes(whole)
