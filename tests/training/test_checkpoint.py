"""What of a run goes into its checkpoints: tensors, counters, layout, the engine's numbers, and what is asked for."""

import torch

from megatron.checkpoint.fragments import open_tensors
from megatron.checkpoint.state_file import read_checkpoint
from megatron.checkpoint.streams import has_streams
from megatron.training.checkpoint import CheckpointWriter
from megatron.training.state import TrainState
from tests.checkpoint import toy


class ToyEngine:
    def state_fragments(self):
        yield from toy.fragments(7)

    def state(self):
        return {"optimizer": {"type": "adam", "step": 7}}


class ToyStreams:
    def state_dict(self):
        return toy.streams()


def save(root, **options):
    options = {"streams": ToyStreams(), **options}
    writer = CheckpointWriter(toy.open_store(root), layout={"data_parallel_size": 1}, **options)
    (saved,) = writer.save(ToyEngine(), TrainState(iteration=7, consumed_samples=28))
    return saved.path


def test_all_that_a_run_needs_is_in_its_checkpoint(tmp_path):
    path = save(tmp_path, more=lambda: {"more": {"vocab_size": 64}})
    assert read_checkpoint(path).state == {
        "counters": TrainState(iteration=7, consumed_samples=28).to_json(),
        "layout": {"data_parallel_size": 1},
        "engine": {"optimizer": {"type": "adam", "step": 7}},
        "more": {"vocab_size": 64},
    }
    tensors = open_tensors(path)
    assert set(tensors.kinds("w")) == {"weight", "exp_avg"}
    assert torch.equal(tensors.read("w", "exp_avg"), toy.logical(7, "exp_avg"))
    assert has_streams(path, 0)


def test_optimizer_state_and_random_streams_may_be_left_out(tmp_path):
    path = save(tmp_path, streams=None, save_optimizer=False)
    assert open_tensors(path).kinds("w") == ("weight",)
    assert not has_streams(path, 0)


def test_what_is_asked_for_is_asked_before_the_tensors_are_taken(tmp_path):
    order = []

    class Engine(ToyEngine):
        def state_fragments(self):
            order.append("tensors")
            return super().state_fragments()

    writer = CheckpointWriter(
        toy.open_store(tmp_path), layout={}, streams=None, more=lambda: order.append("more") or {}
    )
    writer.save(Engine(), TrainState(iteration=1))
    assert order == ["more", "tensors"]
