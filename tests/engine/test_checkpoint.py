"""A resumed run is the uninterrupted one, bit for bit; a checkpoint is read without running anything in it."""

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError
from megatron.engine.checkpoint_files import ALLOWED_CLASSES, read_file, write_file
from megatron.engine.module_weights import load_module_weights
from tests.engine import toy
from tests.ranks import run_on_ranks

CASES = [
    {"stage": stage, "precision": precision, "cpu_optimizer": offload}
    for precision, stage, offload in itertools.product(("fp32", "bf16", "fp16"), range(4), (False, True))
    if stage > 0 or (precision == "fp32" and not offload)
] + [{"stage": 3, "precision": precision, "remote_device": "cpu"} for precision in ("fp32", "bf16", "fp16")]


def name_of(case):
    return "-".join(str(value) for value in case.values())


def config_of(case, clip_grad=1.0):
    # Scaled so that a step overflows in fp16 before the save, and the scale grows after it.
    return toy.run_config(clip_grad=clip_grad, initial_loss_scale=2.0**17, loss_scale_window=2, hysteresis=1, **case)


def step(engine, index):
    batches = toy.make_batches(index, dist.get_rank(), dist.get_world_size(), 1 + index % 2)
    result = engine.train_step(batches, toy.rate(index), 0.1)
    return result.loss.item(), result.grad_norm.item(), result.skipped, result.loss_scale


def resume_each(folder, cases):
    toy.pretend_fp16_works()
    outcomes = {}
    for case in cases:
        directory = Path(folder) / name_of(case) / "step3"
        engine = toy.build_engine(config_of(case))
        before = [step(engine, index) for index in range(3)]
        engine.save(directory)
        saved = toy.full_weights(engine)
        straight = [step(engine, index) for index in range(3, 8)], toy.full_weights(engine)
        engine.close()
        model = toy.ToyModel()
        with torch.no_grad():  # a fresh engine starts elsewhere
            for parameter in model.parameters():
                parameter.zero_()
        engine = toy.build_engine(config_of(case), model=model)
        engine.load(directory)
        resumed = [step(engine, index) for index in range(3, 8)], toy.full_weights(engine)
        engine.close()
        outcomes[name_of(case)] = before, straight, resumed, saved
    return outcomes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_on_ranks(2, resume_each, str(folder), CASES, deepspeed=True)


def test_a_resumed_run_continues_bit_for_bit(saved):
    for outcomes in saved[1]:
        for case, (_, (steps, weights), (resumed_steps, resumed_weights), _) in outcomes.items():
            assert resumed_steps == steps, case
            for name in weights:
                assert torch.equal(resumed_weights[name], weights[name]), f"{case} {name}"


def resume_with_weights_elsewhere(folder):
    """Steps after resuming a run with its weights on the device, or in pairs of ranks, or on the host."""
    outcomes = []
    for number, (first, second) in enumerate(itertools.permutations(("none", "cpu", "pairs"), 2)):
        steps = []
        for place in (first, second):
            config = toy.run_config(stage=3, precision="bf16", remote_device="cpu" if place == "cpu" else "none")
            zero = {"stage3_param_persistence_threshold": 10, "zero_hpz_partition_size": 2 if place == "pairs" else 1}
            engine = toy.build_engine(config, {"zero_optimization": zero})
            directory = Path(folder) / str(number) / "step1"
            if steps:
                engine.load(directory)
            else:
                step(engine, 0)
                engine.save(directory)
            steps.append([step(engine, index) for index in (1, 2)])
            engine.close()
        outcomes.append((first, second, *steps))
    return outcomes


def test_where_the_weights_are_kept_may_change_when_a_run_is_resumed(tmp_path):
    for first, second, straight, resumed in run_on_ranks(
        2, resume_with_weights_elsewhere, str(tmp_path), deepspeed=True
    )[0]:
        assert resumed == straight, (first, second)


def test_the_fp16_cases_save_a_loss_scale_that_has_moved(saved):
    for case, (before, (after, _), _, _) in saved[1][0].items():
        scales = [scale for *_, scale in before + after]
        assert (len(set(scales)) > 1) == ("fp16" in case), f"{case} {scales}"


def test_full_weights_of_every_stage_are_read_without_an_engine(saved):
    folder, outcomes = saved
    for case, (_, _, _, expected) in outcomes[0].items():
        weights = load_module_weights(folder / case / "step3")
        assert weights.keys() == expected.keys(), case
        for name, weight in weights.items():
            assert weight.dtype == {"fp3": torch.float32, "bf1": torch.bfloat16, "fp1": torch.float16}[case[2:5]]
            assert torch.equal(weight.float(), expected[name]), f"{case} {name}"


def test_files_hold_no_classes_but_the_allowed_ones_and_nothing_lies_beside_them(saved):
    folder, outcomes = saved
    allowed = {f"{cls.__module__}.{cls.__qualname__}" for cls in ALLOWED_CLASSES}
    seen = set()
    for case in outcomes[0]:
        files = list((folder / case).rglob("*"))
        assert all(file.suffix == ".pt" or file.is_dir() for file in files), files
        for file in (file for file in files if file.suffix == ".pt"):
            seen |= set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    assert seen == allowed


def clip_after_resume(folder, clip_grad):
    engine = toy.build_engine(config_of({"stage": 1, "precision": "bf16"}, clip_grad=clip_grad))
    engine.load(Path(folder))
    return engine._engine.optimizer.clip_grad


def load_without_own_file(folder):
    directory = Path(folder) / "step1"
    engine = toy.build_engine(toy.run_config(stage=1))
    engine.save(directory)
    dist.barrier()
    if dist.get_rank() == 1:
        next(directory.glob("*rank_1*optim*")).unlink()
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        engine.load(directory)
    return str(caught.value)


def resume_otherwise(folder, other):
    return clip_after_resume(f"{folder}/1-bf16-False/step3", 0.25), load_without_own_file(other)


def test_a_changed_clip_holds_after_resume_and_a_missing_shard_stops_all_ranks(saved, tmp_path):
    (clip, first), (_, second) = run_on_ranks(2, resume_otherwise, str(saved[0]), str(tmp_path), deepspeed=True)
    assert clip == 0.25
    assert "1 ranks lack their files" in first
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is missing" in second


REFUSALS = [
    ("1-fp32-False", {"stage": 1}, "data-parallel size 2, not 1"),
    ("3-fp32-False", {"stage": 3}, "data-parallel size 2, not 1"),
    ("2-fp32-False", {"stage": 0}, "--zero-stage 2, not 0"),
    ("1-bf16-False", {"stage": 1, "precision": "bf16", "cpu_optimizer": True}, "--cpu-optimizer False, not True"),
    ("1-fp32-False", {"stage": 1, "optimizer": "sgd"}, "--optimizer AdamW, not SGD"),
    ("1-fp32-False", {"stage": 3}, "another number of ranks, --zero-stage or --precision"),
    ("1-fp32-False", {"stage": 1, "precision": "bf16"}, "another number of ranks, --zero-stage or --precision"),
]


def refuse_other_layouts(folder):
    messages = []
    for name, case, _ in REFUSALS:
        engine = toy.build_engine(toy.run_config(**case))
        with pytest.raises(CheckpointError) as caught:
            engine.load(Path(folder) / name / "step3")
        messages.append(str(caught.value))
        engine.close()
    return messages


def test_a_checkpoint_of_another_layout_is_refused_with_what_differs(saved):
    messages = run_on_ranks(1, refuse_other_layouts, str(saved[0]), deepspeed=True)[0]
    for (name, _, expected), message in zip(REFUSALS, messages, strict=True):
        assert expected in message
        assert name in message


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"module": Payload(str(trap))}, tmp_path / "bad.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(str(trap))))
    for name in ("bad.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_file(tmp_path / name)
    assert not trap.exists()


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "cut.pt"
    write_file({"weight": torch.ones(1000)}, path)
    assert torch.equal(read_file(path)["weight"], torch.ones(1000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        read_file(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    write_file({"step": 1}, path)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        write_file({"step": lambda: 2}, path)
    assert read_file(path) == {"step": 1}


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model weights"):
        load_module_weights(tmp_path)
