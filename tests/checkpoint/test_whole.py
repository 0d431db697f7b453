"""A checkpoint that one process writes from logical tensors is complete, and loads like any other."""

import hashlib
import itertools

import pytest
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.files import read_json
from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.whole import write_checkpoint
from megatron.training.state import TrainState

TENSORS = {"1.weight": torch.randn(6, 4), "2.weight": torch.randn(8).bfloat16(), "3.weight": torch.randn(2, 3, 4)}
CONFIG = {"model": {"hidden_size": 4}}


def test_tensors_come_back_with_their_padding_and_states(tmp_path):
    states = [("1.weight", kind, torch.randn(6, 4)) for kind in ("exp_avg", "exp_avg_sq")]
    folder = write_checkpoint(
        tmp_path, TENSORS.items(), config=CONFIG, iteration=3, paddings={"1.weight": 2}, states=states
    )
    assert (tmp_path / "latest").read_text() == "step_0000003\n"
    tensors = open_tensors(folder)
    tensors.check()
    assert tensors.names == tuple(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors.read(name), tensor)
        assert tensors.dtype(name) == tensor.dtype
    assert [tensors.padding(name) for name in TENSORS] == [2, 0, 0]
    for name, kind, tensor in states:
        assert torch.equal(tensors.read(name, kind), tensor)


def test_every_file_is_in_the_manifest_with_its_hash(tmp_path):
    folder = write_checkpoint(tmp_path, TENSORS.items(), config=CONFIG, iteration=3, largest_file=100)
    files = read_json(folder / "manifest.json")["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert len([name for name in files if name.startswith("tensors_")]) == 3
    for name, digest in files.items():
        content = (folder / name).read_bytes()
        assert digest == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_counters_are_those_of_a_run(tmp_path):
    folder = write_checkpoint(
        tmp_path, TENSORS.items(), config=CONFIG, iteration=3, counters={"consumed_samples": 24}, engine={"steps": 3}
    )
    state = read_json(folder / "state.json")
    assert TrainState.from_json(state["counters"]) == TrainState(iteration=3, consumed_samples=24)
    assert state["engine"] == {"steps": 3}
    assert read_json(folder / "config.json") == CONFIG
    with pytest.raises(CheckpointError, match="does not count samples"):
        write_checkpoint(tmp_path, [], config=CONFIG, iteration=4, counters={"samples": 1})


def test_tensors_are_taken_one_after_the_other(tmp_path):
    alive = []

    def made():
        import gc
        import weakref

        for index in itertools.count():
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 3  # a full file, and the next one's first
            if index == 12:
                return
            tensor = torch.full((100,), float(index))
            alive.append(weakref.ref(tensor))
            yield f"{index:02d}", tensor
            del tensor

    folder = write_checkpoint(tmp_path, made(), config=CONFIG, iteration=1, largest_file=800)
    tensors = open_tensors(folder)
    assert [tensors.read(name)[0].item() for name in tensors.names] == list(range(12))


def test_a_name_that_comes_twice_or_an_iteration_that_is_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"1\.weight .* written twice"):
        write_checkpoint(tmp_path, [*TENSORS.items(), ("1.weight", torch.ones(6, 4))], config=CONFIG, iteration=1)
    assert not (tmp_path / "latest").exists()
    write_checkpoint(tmp_path, TENSORS.items(), config=CONFIG, iteration=2)
    with pytest.raises(CheckpointError, match="is there already"):
        write_checkpoint(tmp_path, TENSORS.items(), config=CONFIG, iteration=2)
