"""DeepSpeed's dictionary says everything that matters, and refuses what contradicts the flags. Runs without torch."""

import dataclasses
import subprocess
import sys

import pytest

from megatron.config.deepspeed_json import FLAG_PATHS
from megatron.config.engine import EngineConfig
from megatron.config.errors import ConfigError
from megatron.config.kernels import KernelsConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.sections import RunConfig
from megatron.config.training import TrainingConfig
from megatron.engine.settings import build_settings
from megatron.engine.user_settings import FIXED, OWNED


def make_config(
    stage=1, cpu_optimizer=False, remote_device="none", optimizer="adam", clip_grad=1.0, stages=1, **training
):
    training = {"micro_batch_size": 2, "global_batch_size": 24} | training
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        optimizer=OptimizerConfig(lr=3e-4, optimizer=optimizer, clip_grad=clip_grad),
        training=TrainingConfig(**training),
        engine=EngineConfig(zero_stage=stage, cpu_optimizer=cpu_optimizer, remote_device=remote_device),
        kernels=KernelsConfig(),
        parallel=ParallelConfig(pipeline_model_parallel_size=stages),
    )


def build(user=None, device_type="cpu", **config):
    return build_settings(make_config(**config), user, data_parallel_size=3, device_type=device_type)


def sentences(user=None, **config):
    with pytest.raises(ConfigError) as caught:
        build(user, **config)
    return caught.value.messages


def test_settings_are_built_without_torch():
    code = (
        "import sys, megatron.engine.settings, megatron.engine.launch; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_batch_sizes_are_consistent():
    settings = build()
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 4


def test_clipping_is_written_also_when_it_is_off():
    assert build(clip_grad=0.0)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("precision", "in_fp32", "expected"),
    [("bf16", True, "fp32"), ("bf16", False, "bf16"), ("fp16", True, "fp32"), ("fp16", False, "fp16")],
)
def test_gradients_are_summed_and_sent_in_the_dtype_that_the_flag_says(precision, in_fp32, expected):
    settings = build(precision=precision, accumulate_allreduce_grads_in_fp32=in_fp32)
    assert settings["data_types"]["grad_accum_dtype"] == expected
    assert settings["communication_data_type"] == expected
    assert settings["bf16"]["enabled"] == (precision == "bf16")
    assert settings["fp16"]["enabled"] == (precision == "fp16")


def test_gradients_of_fp32_training_are_fp32_whatever_the_flag():
    settings = build(precision="fp32", accumulate_allreduce_grads_in_fp32=False)
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"


def test_the_fp16_flags_arrive():
    settings = build(
        precision="fp16", initial_loss_scale=2.0**12, loss_scale_window=5, hysteresis=3, min_loss_scale=4.0
    )
    fp16 = settings["fp16"]
    assert (fp16["loss_scale"], fp16["initial_scale_power"], fp16["loss_scale_window"]) == (0, 12, 5)
    assert (fp16["hysteresis"], fp16["min_loss_scale"]) == (3, 4)
    assert build(precision="fp16", loss_scale=128.0)["fp16"]["loss_scale"] == 128.0


def test_the_default_optimizer_is_torchs_fused_adamw():
    optimizer = build()["optimizer"]
    assert optimizer["type"] == "AdamW"
    assert optimizer["params"]["torch_adam"] is True
    assert optimizer["params"]["fused"] is True


def test_offload_keeps_torchs_optimizer_on_the_host():
    settings = build(cpu_optimizer=True, device_type="cuda")
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert settings["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("granularity", ["none", "full", "selective", "products"])
def test_linear_layers_add_no_bias_in_place_where_their_products_are_kept(granularity):
    config = dataclasses.replace(make_config(), kernels=KernelsConfig(recompute_granularity=granularity))
    zero = build_settings(config, None, data_parallel_size=3, device_type="cpu")["zero_optimization"]
    assert zero["memory_efficient_linear"] == (granularity != "products")


def test_zero_3_gathers_a_block_at_a_time():
    from megatron.model.block import Block  # which needs torch

    leaves = build(stage=3)["zero_optimization"]["leaf_module"]["classes"]
    assert leaves == [f"{Block.__module__}.{Block.__qualname__}"]
    assert "leaf_module" not in build(stage=2)["zero_optimization"]


def test_weights_on_the_host_are_pinned_for_a_gpu():
    zero = build(stage=3, remote_device="cpu", device_type="cuda")["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    zero = build({"zero_optimization": {"offload_param": {"pin_memory": False}}}, stage=3, remote_device="cpu")
    assert zero["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert "offload_param" not in build(stage=3)["zero_optimization"]


def test_a_file_may_choose_deepspeeds_adam():
    params = build({"optimizer": {"type": "Adam", "params": {"torch_adam": False}}})["optimizer"]["params"]
    assert params["torch_adam"] is False
    assert "fused" not in params
    assert params["lr"] == 3e-4


def test_sgd_is_told_to_zero_as_wanted():
    settings = build(optimizer="sgd")
    assert settings["optimizer"] == {"type": "SGD", "params": {"lr": 3e-4, "weight_decay": 0.01, "momentum": 0.9}}
    assert settings["zero_allow_untested_optimizer"] is True


def test_a_file_fills_in_what_no_flag_says():
    user = {
        "zero_optimization": {"prefetch_bucket_size": 7, "stage3_max_live_parameters": 8, "sub_group_size": 9},
        "communication_data_type": "bf16",
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
    }
    settings = build(user)
    assert settings["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert "prefetch_bucket_size" not in settings["zero_optimization"]
    assert settings["zero_optimization"]["stage3_max_live_parameters"] == 8
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["communication_data_type"] == "bf16"
    assert settings["wall_clock_breakdown"] is True
    assert settings["comms_logger"] == {"enabled": True}


def test_auto_and_equal_values_leave_the_settings_as_they_are():
    user = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1,
        "bfloat16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "data_types": {"grad_accum_dtype": "float32"},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    }
    assert build(user) == build()


def test_each_contradiction_names_both_values_and_the_flag():
    messages = sentences(
        {
            "train_batch_size": 48,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "optimizer": {"params": {"lr": 1e-3}},
        }
    )
    assert len(messages) == 5
    for message, parts in zip(
        messages,
        [
            ("train_batch_size = 48", "--global-batch-size", "24"),
            ("gradient_clipping = 0.5", "--clip-grad", "1.0"),
            ("zero_optimization.stage = 2", "--zero-stage", "1"),
            ("offload_optimizer.device = 'cpu'", "--cpu-optimizer", "None"),
            ("optimizer.params.lr = 0.001", "--lr", "0.0003"),
        ],
        strict=True,
    ):
        assert all(part in message for part in parts), message


def test_an_unknown_key_is_refused_with_the_nearest_names():
    (message,) = sentences({"zero_optimisation": {"stage": 3}})
    assert "'zero_optimisation'" in message
    assert "did you mean zero_optimization?" in message


@pytest.mark.parametrize(
    ("user", "name", "advice"),
    [
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype", "grad_accum_dtype"),
        ({"optimizer": {"params": {"beta": 0.9}}}, "optimizer.params.beta", "betas"),
        ({"optimizer": {"kind": "AdamW"}}, "optimizer.kind", ""),
    ],
)
def test_an_unknown_key_inside_a_dictionary_that_deepspeed_does_not_check_is_refused(user, name, advice):
    (message,) = sentences(user)
    assert f"'{name}'" in message
    assert advice in message


@pytest.mark.parametrize(
    ("user", "part"),
    [
        ({"bf16": True}, "'bf16' is True but must be a dictionary"),
        ({"gradient_clipping": {"value": 1.0}}, "'gradient_clipping' must be a value"),
    ],
)
def test_a_dictionary_in_place_of_a_value_or_the_reverse_is_refused(user, part):
    (message,) = sentences(user)
    assert part in message


def test_an_empty_dictionary_changes_nothing():
    assert build({"bf16": {}, "zero_optimization": {}, "optimizer": {"params": {}}}) == build()


@pytest.mark.parametrize(
    ("user", "part"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "--lr-decay-style"),
        ({"elasticity": {}}, "--global-batch-size"),
        ({"curriculum_learning": {"enabled": True}}, "removed"),
        ({"activation_checkpointing": {"partition_activations": True}}, "--recompute-granularity"),
        ({"zero_optimization": {"cpu_offload": True}}, "--cpu-optimizer"),
        ({"zero_optimization": {"cpu_offload_param": True}}, "--remote-device cpu"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offloads to the host alone"),
        ({"zero_optimization": {"offload_param": {"nvme_path": "/fast"}}}, "offloads to the host alone"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, "on the host as a whole"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "every weight is trained"),
        ({"checkpoint": {"writer": {"type": "FAST"}}}, "cannot be read back"),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}, "--clip-grad"),
        ({"optimizer": {"type": "Lion"}}, 'should be "AdamW"'),
        ({"optimizer": {"type": "SGD"}}, "--optimizer makes it 'AdamW'"),
    ],
)
def test_what_the_framework_does_itself_is_refused_with_advice(user, part):
    (message,) = sentences(user)
    assert part in message


def test_values_that_the_framework_relies_on_cannot_be_changed():
    for name in FIXED:
        *above, last = name.split(".")
        ours = build()
        for key in (*above, last):
            ours = ours[key]
        wrong = (not ours) if isinstance(ours, bool) else "sum"
        user = {last: wrong}
        for key in reversed(above):
            user = {key: user}
        (message,) = sentences(user)
        assert name in message
        assert FIXED[name] in message


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"stage": 0, "precision": "bf16"}, "--zero-stage 1"),
        ({"stage": 0, "precision": "fp32", "cpu_optimizer": True}, "--cpu-optimizer"),
        ({"stage": 2, "remote_device": "cpu"}, "--zero-stage 3"),
        ({"global_batch_size": 25}, "25 is not a multiple"),
        ({"precision": "fp16", "initial_loss_scale": 1000.0}, "power of two"),
        ({"precision": "fp16", "min_loss_scale": 0.5}, "whole number"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(config, part):
    (message,) = sentences(**config)
    assert part in message


HPZ, QUANTIZED = "zero_hpz_partition_size", "zero_quantized_weights"


@pytest.mark.parametrize(
    ("values", "config", "part"),
    [
        ({HPZ: 3}, {"stage": 2}, "--zero-stage 3"),
        ({HPZ: 2}, {"stage": 3}, "2, which does not divide the 3 ranks"),
        ({QUANTIZED: True}, {"stage": 1, "device_type": "cuda"}, "--zero-stage 3"),
        ({QUANTIZED: True}, {"stage": 3}, "CUDA"),
        ({QUANTIZED: True}, {"stage": 3, "precision": "fp32", "device_type": "cuda"}, "--precision fp32"),
    ],
)
def test_what_is_for_divided_weights_is_refused_where_it_would_be_ignored_or_fail(values, config, part):
    (message,) = sentences({"zero_optimization": values}, **config)
    assert f"'zero_optimization.{next(iter(values))}'" in message
    assert part in message


def test_what_is_for_divided_weights_passes_with_zero_3():
    zero = build({"zero_optimization": {HPZ: 3, QUANTIZED: True}}, stage=3, device_type="cuda")["zero_optimization"]
    assert (zero[HPZ], zero[QUANTIZED]) == (3, True)
    assert build({"zero_optimization": {HPZ: 1, QUANTIZED: False}}, stage=1)


def test_every_key_that_a_flag_owns_is_checked():
    assert set(OWNED) >= FLAG_PATHS


@pytest.mark.parametrize(
    ("user", "name"),
    [
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler"),
    ],
)
def test_deepspeeds_timers_are_refused_in_a_pipeline_alone(user, name):
    assert build(user)
    (sentence,) = sentences(user, stages=2)
    assert f"'{name}" in sentence
    assert "--pipeline-model-parallel-size" in sentence


@pytest.mark.parametrize("name", ["stages", "partition", "seed_layers", "activation_checkpoint_interval"])
def test_what_the_framework_says_of_a_pipeline_is_refused_in_the_file(name):
    (sentence,) = sentences({"pipeline": {name: 2}}, stages=2)
    assert f"'pipeline.{name}' is not supported" in sentence
