from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import deepspeed_json
from megatron.config.errors import ConfigError
from megatron.config.run import LoadedConfig, load_run_config
from megatron.config.sections import all_flags
from tests.config.command_lines import legal


def write(folder: Path, content: Any) -> str:
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def load(folder: Path, content: Any, *words: str, world_size: int | None = None) -> LoadedConfig:
    return load_run_config(legal(*words, "--deepspeed_config", write(folder, content)), world_size)


def value(loaded: LoadedConfig, field: str) -> Any:
    return getattr(getattr(loaded.config, all_flags()[field].section), field)


CASES = [
    ({"zero_optimization": {"stage": 3}}, "zero_stage", 3, "2"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "remote_device", "cpu", "none"),
    ({"gradient_clipping": 0.5}, "clip_grad", 0.5, "1.0"),
    ({"train_batch_size": 64}, "global_batch_size", 64, "32"),
    ({"train_micro_batch_size_per_gpu": 8}, "micro_batch_size", 8, "4"),
    ({"zero_optimization": {"reduce_bucket_size": 5e8}}, "zero_reduce_bucket_size", 500_000_000, "7"),
    ({"zero_optimization": {"allgather_bucket_size": 9}}, "zero_allgather_bucket_size", 9, "7"),
    ({"fp16": {"enabled": True}}, "precision", "fp16", "bf16"),
    ({"bf16": {"enabled": True}}, "precision", "bf16", "fp32"),
    ({"bfloat16": {"enabled": True}}, "precision", "bf16", "fp32"),
    ({"bf16": {"enabled": False}}, "precision", "fp32", "bf16"),
    ({"fp16": {"loss_scale": 128}}, "loss_scale", 128, "64"),
    ({"fp16": {"loss_scale": 0}}, "loss_scale", None, "64"),
    ({"fp16": {"initial_scale_power": 12}}, "initial_loss_scale", 4096.0, "1024"),
    ({"fp16": {"loss_scale_window": 500}}, "loss_scale_window", 500, "100"),
    ({"fp16": {"hysteresis": 3}}, "hysteresis", 3, "2"),
    ({"fp16": {"min_loss_scale": 2}}, "min_loss_scale", 2, "1"),
    ({"optimizer": {"type": "SGD"}}, "optimizer", "sgd", "adam"),
    ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "adam_beta2", 0.95, "0.999"),
    ({"optimizer": {"params": {"eps": 1e-6}}}, "adam_eps", 1e-6, "1e-8"),
    ({"optimizer": {"params": {"weight_decay": 0.1}}}, "weight_decay", 0.1, "0.2"),
    ({"optimizer": {"params": {"momentum": 0.8}}}, "sgd_momentum", 0.8, "0.7"),
]


@pytest.mark.parametrize(("content", "field", "expected", "_"), CASES)
def test_value_of_the_file_wins_over_the_default(
    tmp_path: Path, content: Any, field: str, expected: Any, _: str
) -> None:
    loaded = load(tmp_path, content)
    assert value(loaded, field) == expected
    assert type(value(loaded, field)) is type(expected)
    assert loaded.sources[field].startswith(f"file {tmp_path / 'ds.json'}: ")


@pytest.mark.parametrize(("content", "field", "expected", "other"), CASES)
def test_explicit_flag_that_contradicts_names_both_values_key_and_flag(
    tmp_path: Path, content: Any, field: str, expected: Any, other: str
) -> None:
    flag = all_flags()[field].spelling
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, content, flag, other)
    told = str(raised.value)
    section = next(iter(content))
    assert flag in told
    assert other in told or str(float(other)) in told or json.dumps(float(other)) in told
    assert section.replace("bfloat16", "bf16") in told
    assert "ds.json" in told


@pytest.mark.parametrize(("content", "field", "expected", "_"), CASES[:8])
def test_explicit_flag_that_agrees_is_no_contradiction(
    tmp_path: Path, content: Any, field: str, expected: Any, _: str
) -> None:
    loaded = load(tmp_path, content, all_flags()[field].spelling, str(expected))
    assert (value(loaded, field), loaded.sources[field]) == (expected, "flag")


def test_peak_learning_rate_may_stand_in_the_file_alone(tmp_path: Path) -> None:
    words = legal("--deepspeed_config", write(tmp_path, {"optimizer": {"params": {"lr": 2e-4}}}), without="--lr")
    assert load_run_config(words).config.optimizer.lr == 2e-4


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("none", False)])
def test_offload_of_the_optimizer_is_cpu_optimizer(tmp_path: Path, device: str, expected: bool) -> None:
    content = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    assert value(load(tmp_path, content), "cpu_optimizer") is expected
    with pytest.raises(ConfigError, match="--cpu-optimizer"):
        load(tmp_path, content, "--no-cpu-optimizer" if expected else "--cpu-optimizer")


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", True), ("bf16", False), ("bfloat16", False)])
def test_dtype_of_summed_gradients_is_read(tmp_path: Path, dtype: str, expected: bool) -> None:
    loaded = load(tmp_path, {"data_types": {"grad_accum_dtype": dtype}})
    assert value(loaded, "accumulate_allreduce_grads_in_fp32") is expected


def test_auto_takes_the_flag(tmp_path: Path) -> None:
    content = {"train_batch_size": "auto", "zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}
    loaded = load(tmp_path, content, "--zero-stage", "2", "--global-batch-size", "6")
    assert [value(loaded, field) for field in ("zero_stage", "global_batch_size", "precision")] == [2, 6, "bf16"]


def test_fp16_switched_off_contradicts_nothing(tmp_path: Path) -> None:
    assert value(load(tmp_path, {"fp16": {"enabled": False}}), "precision") == "bf16"
    both_off = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    assert value(load(tmp_path, both_off), "precision") == "fp32"
    assert value(load(tmp_path, {"bf16": {"enabled": False}}, "--fp16"), "precision") == "fp16"


def test_config_file_counts_as_explicit(tmp_path: Path) -> None:
    flags = tmp_path / "run.toml"
    flags.write_text("zero_stage = 1")
    with pytest.raises(ConfigError, match="--zero-stage is 1"):
        load(tmp_path, {"zero_optimization": {"stage": 2}}, "--config", str(flags))


class TestGradientAccumulation:
    def test_implies_the_global_batch(self, tmp_path: Path) -> None:
        loaded = load(
            tmp_path, {"gradient_accumulation_steps": 4}, "--micro-batch-size", "2", "--zero-stage", "1", world_size=8
        )
        assert value(loaded, "global_batch_size") == 64
        assert loaded.sources["global_batch_size"].endswith("gradient_accumulation_steps")

    def test_implies_the_micro_batch(self, tmp_path: Path) -> None:
        loaded = load(tmp_path, {"gradient_accumulation_steps": 4, "train_batch_size": 64}, world_size=8)
        assert value(loaded, "micro_batch_size") == 2

    def test_agrees_with_both(self, tmp_path: Path) -> None:
        content = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
        assert value(load(tmp_path, content, world_size=8), "global_batch_size") == 64

    def test_contradicts_both(self, tmp_path: Path) -> None:
        content = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
        with pytest.raises(ConfigError) as raised:
            load(tmp_path, content, "--global-batch-size", "48", world_size=8)
        told = str(raised.value)
        assert all(part in told for part in ("gradient_accumulation_steps", "is 4", "--global-batch-size 48", "8 data"))

    def test_refuses_a_growing_batch(self, tmp_path: Path) -> None:
        words = ("--rampup-batch-size", "1", "1", "8", "--global-batch-size", "4")
        with pytest.raises(ConfigError, match="--rampup-batch-size"):
            load(tmp_path, {"gradient_accumulation_steps": 4}, *words)

    @pytest.mark.parametrize("steps", [0, 1.5, True, "4"])
    def test_must_be_a_count(self, tmp_path: Path, steps: Any) -> None:
        with pytest.raises(ConfigError, match="at least 1"):
            load(tmp_path, {"gradient_accumulation_steps": steps})


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device"),
        ({"gradient_clipping": "1"}, "gradient_clipping"),
        ({"train_batch_size": 6.5}, "train_batch_size"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "grad_accum_dtype"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type"),
        ({"optimizer": {"params": {"betas": 0.9}}}, "optimizer.params.betas"),
    ],
)
def test_value_of_the_wrong_kind_is_told_with_its_key(tmp_path: Path, content: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        load(tmp_path, content)


def test_all_contradictions_are_told_at_once(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": 2, "train_batch_size": 8}
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, content, "--zero-stage", "1", "--clip-grad", "1", "--global-batch-size", "4")
    assert len(raised.value.messages) == 3


def test_missing_file_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"^--deepspeed-config /none.json cannot be read: No such file or directory.$"
    ):
        load_run_config(legal("--deepspeed_config", "/none.json"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "b" 2}', "Expecting ':' delimiter at line 2, column 6"),
        ("[1]", "is not a JSON dictionary but a list"),
        ("", "line 1, column 1"),
    ],
)
def test_malformed_file_is_told_with_its_place(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    assert sentence in str(raised.value)
    assert "ds.json" in str(raised.value)


def test_table_names_fields_that_are_there() -> None:
    assert {key.field for key in deepspeed_json.KEYS} <= set(all_flags())
    assert {key.path for key in deepspeed_json.KEYS} <= deepspeed_json.FLAG_PATHS
