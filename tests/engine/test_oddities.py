"""What DeepSpeed does that the engine works around: when one of these fails, the work-around may go."""

import inspect
import math
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron.engine.settings import build_settings
from megatron.engine.user_settings import known_top_level
from tests.engine import toy
from tests.ranks import run_on_ranks


def initialize(settings, model=None):
    """DeepSpeed's own engine, without this framework's around it."""
    import deepspeed

    model = model or toy.ToyModel()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    return engine


def settings_of(**config):
    return build_settings(toy.run_config(**config), data_parallel_size=dist.get_world_size(), device_type="cpu")


def read_deepspeeds_defaults():
    from deepspeed.runtime.config import DeepSpeedConfig

    class Recording(dict):
        """Remembers which keys were asked for."""

        asked: ClassVar[set[str]] = set()

        def get(self, key, default=None):
            self.asked.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            self.asked.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

    settings = Recording(train_micro_batch_size_per_gpu=1, zero_optimisation={"stage": 3})
    config = DeepSpeedConfig(settings)
    known = known_top_level(settings_of()) | {"bfloat16"}
    return {
        "clips at": config.gradient_clipping,
        "stage of a misspelt key": int(config.zero_optimization_stage),
        "partitions boundaries": config.pipeline["pipe_partitioned"] and config.pipeline["grad_partitioned"],
        "times each micro-batch": config.timers_config.enabled,
        "asked for but unknown here": sorted(Recording.asked - known),
    }


def test_deepspeeds_defaults_are_still_the_ones_that_need_writing():
    (defaults,) = run_on_ranks(1, read_deepspeeds_defaults, deepspeed=True)
    assert defaults == {
        "clips at": 1.0,
        "stage of a misspelt key": 0,
        "partitions boundaries": True,
        "times each micro-batch": True,
        "asked for but unknown here": [],
    }


def sums_in_fp32_travel_in_bf16():
    settings = settings_of(precision="bf16")
    del settings["communication_data_type"]
    engine = initialize(settings)
    assert type(engine.optimizer).__name__ == "BF16_Optimizer"
    assert engine.communication_data_type == torch.bfloat16


def bf16_without_zero_takes_a_step_at_start():
    settings = settings_of(precision="bf16", accumulate_allreduce_grads_in_fp32=False)
    settings["zero_optimization"]["stage"] = 0
    engine = initialize(settings)
    assert {float(state["step"]) for state in engine.basic_optimizer.state.values()} == {1.0}


def fp32_without_zero_tells_no_norm_and_skips_nothing():
    engine = initialize(settings_of(stage=0))
    (batch,) = toy.make_batches(0, 0, 1, 1)
    engine.module.poison = math.nan
    engine.backward(engine(batch.tokens, labels=batch.labels))
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    assert engine.get_global_grad_norm() is None
    assert any(parameter.isnan().any() for parameter in engine.module.parameters())


def zero3_replaces_linear_for_the_process():
    linear = F.linear
    engine = initialize(settings_of(stage=3))
    engine.destroy()
    assert F.linear is not linear
    F.linear = linear


def a_secondary_partition_outlives_its_engine_and_takes_neighbours_in_the_world():
    from deepspeed.utils import groups

    settings = settings_of(stage=3)
    settings["zero_optimization"]["zero_hpz_partition_size"] = 1
    groups._create_zero_param_parallel_group(1)
    engine = initialize(settings)
    (parameter, *_) = engine.module.parameters()
    assert parameter.ds_zero_param_process_group is groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is not None
    engine.destroy()
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is not None
    assert "range(i * zero_param" in inspect.getsource(groups._create_zero_param_parallel_group)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def the_grown_loss_scale_divides_the_step_that_it_follows():
    toy.pretend_fp16_works()
    updates = []
    for window in (1, 1000):
        settings = settings_of(precision="fp16", optimizer="sgd", initial_loss_scale=64.0, loss_scale_window=window)
        engine = initialize(settings)
        engine.set_gradient_accumulation_boundary(True)
        for step in range(2):
            before = engine.module.layer.weight.detach().float().clone()
            (batch,) = toy.make_batches(step, 0, 1, 1, masked=False)
            engine.optimizer.param_groups[0].update(lr=0.1, momentum=0.0, weight_decay=0.0)
            engine.backward(engine(batch.tokens, labels=batch.labels) / 5)
            engine.step()
        updates.append((engine.module.layer.weight.detach().float() - before).norm().item())
    assert updates[0] / updates[1] == pytest.approx(0.5, rel=0.02)


def offload_keeps_the_gradients_of_a_skipped_step():
    engine = toy.build_engine(toy.run_config(precision="bf16", cpu_optimizer=True))
    deepspeeds = engine._engine
    deepspeeds.set_gradient_accumulation_boundary(True)
    overflows = []
    for poison in (math.nan, 0.0):
        deepspeeds.module.poison = poison
        (batch,) = toy.make_batches(0, 0, 1, 1, masked=False)
        deepspeeds.backward(deepspeeds(batch.tokens, labels=batch.labels))
        deepspeeds.step()
        overflows.append(deepspeeds.optimizer.overflow)
    assert overflows == [True, True]


def the_lowest_loss_scale_ends_the_run():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    toy.pretend_fp16_works()
    engine = initialize(settings_of(precision="fp16"))
    scaler = engine.optimizer.loss_scaler
    assert isinstance(scaler, DynamicLossScaler)
    assert scaler.raise_error_at_min_scale


def a_checkpoint_brings_its_own_clip_and_scripts(folder):
    engine = initialize(settings_of(clip_grad=0.5))
    engine.save_checkpoint(folder, tag="step1")
    assert {path.name for path in Path(folder).glob("*.py")} == {"zero_to_fp32.py", "zero_to_torch.py"}
    engine = initialize(settings_of(clip_grad=0.25))
    engine.load_checkpoint(folder, tag="step1")
    assert engine.optimizer.clip_grad == 0.5


def the_shared_memory_operator_is_built_at_start():
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert "__compatible_ops__" in inspect.getsource(build_shm_op)


ODDITIES = [
    sums_in_fp32_travel_in_bf16,
    bf16_without_zero_takes_a_step_at_start,
    fp32_without_zero_tells_no_norm_and_skips_nothing,
    zero3_replaces_linear_for_the_process,
    a_secondary_partition_outlives_its_engine_and_takes_neighbours_in_the_world,
    the_grown_loss_scale_divides_the_step_that_it_follows,
    offload_keeps_the_gradients_of_a_skipped_step,
    the_lowest_loss_scale_ends_the_run,
    the_shared_memory_operator_is_built_at_start,
]


def try_each(folder):
    failures = []
    for oddity in (*ODDITIES, lambda: a_checkpoint_brings_its_own_clip_and_scripts(folder)):
        try:
            oddity()
        except AssertionError as error:
            failures.append(f"{oddity.__name__}: {error!r}")
    return failures


def test_each_oddity_is_still_there(tmp_path):
    assert run_on_ranks(1, try_each, str(tmp_path), deepspeed=True) == [[]]


def compiler_is_loaded(engine_of):
    """Whether torch's compiler is in the process once there is an engine, and was not before."""
    compiler = "torch._inductor.compile_fx"
    assert compiler not in sys.modules
    engine_of(toy.run_config())
    return compiler in sys.modules


def deepspeeds_own_engine(config):
    initialize(build_settings(config, data_parallel_size=1, device_type="cpu"))


@pytest.mark.parametrize(("engine_of", "loads"), [(deepspeeds_own_engine, True), (toy.build_engine, False)])
def test_deepspeed_loads_torchs_compiler_for_an_optimizer_that_is_not_used_and_the_engine_keeps_it_out(
    engine_of, loads
):
    assert run_on_ranks(1, compiler_is_loaded, engine_of, deepspeed=True) == [loads]
