"""What an engine holds goes to disk and comes back: bit for bit in the same layout, and into every other kind of it."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import open_tensors
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
        toy.save(engine, directory)
        saved = toy.full_weights(engine)
        straight = [step(engine, index) for index in range(3, 8)], toy.full_weights(engine)
        engine.close()
        model = toy.ToyModel()
        with torch.no_grad():  # a fresh engine starts elsewhere
            for parameter in model.parameters():
                parameter.zero_()
        engine = toy.build_engine(config_of(case), model=model)
        toy.load(engine, directory)
        resumed = [step(engine, index) for index in range(3, 8)], toy.full_weights(engine)
        engine.close()
        outcomes[name_of(case)] = before, straight, resumed, saved
    return outcomes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_on_ranks(2, resume_each, str(folder), CASES, deepspeed=True, timeout=300)


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
                toy.load(engine, directory)
            else:
                step(engine, 0)
                toy.save(engine, directory)
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
        tensors = open_tensors(folder / case / "step3")
        assert tensors.names == tuple(sorted(expected)), case
        dtype = {"fp3": torch.float32, "bf1": torch.bfloat16, "fp1": torch.float16}[case[2:5]]
        for name in tensors.names:
            assert tensors.kinds(name) == ("weight", "exp_avg", "exp_avg_sq")
            assert torch.equal(tensors.read(name).to(dtype).float(), expected[name]), f"{case} {name}"


def clip_after_resume(folder, clip_grad):
    engine = toy.build_engine(config_of({"stage": 1, "precision": "bf16"}, clip_grad=clip_grad))
    toy.load(engine, Path(folder))
    return engine._engine.optimizer.clip_grad


def load_without_own_file(folder):
    directory = Path(folder) / "step1"
    engine = toy.build_engine(toy.run_config(stage=1))
    step(engine, 0)
    toy.save(engine, directory)
    if dist.get_rank() == 1:
        next(directory.glob("tensors_00001_*")).unlink()
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        toy.load(engine, directory)
    return str(caught.value)


def resume_otherwise(folder, other):
    return clip_after_resume(f"{folder}/1-bf16-False/step3", 0.25), load_without_own_file(other)


def test_a_changed_clip_holds_after_resume_and_a_missing_shard_stops_all_ranks(saved, tmp_path):
    (clip, first), (_, second) = run_on_ranks(2, resume_otherwise, str(saved[0]), str(tmp_path), deepspeed=True)
    assert clip == 0.25
    assert "tensors_00001_00.safetensors cannot be read" in second
    assert "rank 1 cannot load" in first


def moments_of(engine):
    """Masters and states of a rank alone, by name and kind."""
    return {(part.name, part.kind): part.tensor.clone() for part in engine.state_fragments()}


def stages(precision, **more):
    return [
        {"stage": stage, "precision": precision, "cpu_optimizer": offload, **more}
        for stage, offload in ((0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True))
        if stage > 0 or precision == "fp32"
    ]


OTHERS = [*stages("fp32"), *stages("bf16"), *stages("fp16"), {"stage": 1, "precision": "bf16", "own_sums": True}]
"""Own sums: gradients add up in bf16, which another of DeepSpeed's wrappers does."""


def build(case):
    case = dict(case)
    own_sums = {"accumulate_allreduce_grads_in_fp32": False} if case.pop("own_sums", False) else {}
    return toy.build_engine(toy.run_config(clip_grad=1.0, initial_loss_scale=1024.0, **case, **own_sums))


def reshape_each(folder):
    """What every other kind of engine, on one rank, has of what two ranks saved, and its next step."""
    toy.pretend_fp16_works()
    outcomes = []
    for name in ("1-bf16-False", "3-fp32-True", "0-fp32-False"):
        tensors = open_tensors(Path(folder) / name / "step3")
        expected = {(name, kind): tensors.read(name, kind) for name in tensors.names for kind in tensors.kinds(name)}
        for case in OTHERS:
            engine = build(case)
            toy.load(engine, Path(folder) / name / "step3")
            found = moments_of(engine)
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                assert torch.equal(tensor.view(expected[key].shape), expected[key]), (name, case, key)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case["precision"]]
            for key, weight in toy.full_weights(engine).items():
                assert torch.equal(weight, expected[key, "weight"].to(dtype).float()), (name, case, key)
            assert engine.state()["optimizer"]["step"] == 3
            batches = [batch for rank in range(2) for batch in toy.make_batches(3, rank, 2, 2)]
            result = engine.train_step(batches, toy.rate(3), 0.1)
            outcomes.append((name, case["precision"], result.loss.item(), moments_of(engine)))
            engine.close()
    return outcomes


def test_every_kind_of_engine_goes_on_from_any_other(saved):
    folder, ran = saved
    (outcomes,) = run_on_ranks(1, reshape_each, str(folder), deepspeed=True, timeout=300)
    firsts = {name: moments for name, precision, _, moments in reversed(outcomes) if precision == "fp32"}
    for name, precision, loss, moments in outcomes:
        straight = ran[0][name][1][0][0][0]  # the fourth step of the run that was not interrupted
        assert loss == pytest.approx(straight, rel=1e-5 if precision == "fp32" and "fp32" in name else 2e-2), name
        for key, tensor in moments.items():
            if precision == "fp32":
                torch.testing.assert_close(tensor, firsts[name][key], rtol=1e-5, atol=1e-6)


def begin_and_refuse(folder):
    """Checkpoints before the first step; those of another optimizer, or of none."""
    folder = Path(folder)
    messages = []
    for number, case in enumerate(stages("fp32")):
        engine = build(case)
        first = moments_of(engine)
        assert {kind for _, kind in first} == {"weight"}
        toy.save(engine, folder / f"{number}")
        straight = [step(engine, index) for index in range(2)]
        engine.close()
        engine = build(case)
        step(engine, 7)  # moments that have to go
        toy.load(engine, folder / f"{number}")
        assert [step(engine, index) for index in range(2)] == straight, case
        toy.save(engine, folder / f"{number}" / "later")
        engine.close()

    def refuse(engine, name):
        with pytest.raises(CheckpointError) as caught:
            toy.load(engine, folder / name)
        messages.append(str(caught.value))

    engine = toy.build_engine(toy.run_config(stage=1, optimizer="sgd"))
    refuse(engine, "1/later")
    toy.load(engine, folder / "1/later", optimizer=False)
    assert {kind for _, kind in moments_of(engine)} == {"weight"}
    assert all(map(math.isfinite, step(engine, 0)[:2]))
    toy.save(engine, folder / "sgd")
    engine.close()
    engine = build({"stage": 2})
    refuse(engine, "sgd")
    tensors = open_tensors(folder / "1")
    with pytest.raises(CheckpointError) as caught:
        engine.load(tensors, {"optimizer": {"type": "adam", "step": 3}, "loss_scaler": None})
    messages.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        engine.load(tensors, None)
    messages.append(str(caught.value))
    engine.close()
    return messages


def test_a_save_before_the_first_step_has_no_moments_and_another_optimizer_is_refused(tmp_path):
    (messages,) = run_on_ranks(1, begin_and_refuse, str(tmp_path), deepspeed=True)
    for message, expected in zip(
        messages,
        (
            "--optimizer adam, and this run has sgd",
            "--optimizer sgd, and this run has adam",
            "holds no exp_avg of",
            "saved without the optimizer's state: add --no-load-optim",
        ),
        strict=True,
    ):
        assert expected in message
