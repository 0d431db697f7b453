from __future__ import annotations

import json

import pytest

from megatron.config.data import DataConfig
from megatron.config.errors import ConfigError, UserError
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig, build_run_config, parse_run_config
from megatron.config.sections import SECTIONS, all_flags
from megatron.config.training import TrainingConfig
from tests.config.command_lines import LEGAL, legal


def test_every_derived_field_is_concrete_after_parsing() -> None:
    config = parse_run_config(LEGAL)
    derived = [flag for flag in all_flags().values() if flag.info.derived]
    assert len(derived) > 10
    assert all(getattr(getattr(config, flag.section), flag.name) is not None for flag in derived)


@pytest.mark.parametrize(
    ("words", "world_size", "section", "field", "value"),
    [
        (["--micro-batch-size", "3"], None, "training", "global_batch_size", 3),
        (["--micro-batch-size", "3"], 4, "training", "global_batch_size", 12),
        ([], None, "model", "max_position_embeddings", 32),
        ([], None, "model", "num_key_value_heads", 4),
        ([], None, "model", "ffn_hidden_size", 256),
        (["--swiglu", "--hidden-size", "96"], None, "model", "ffn_hidden_size", 256),
        ([], None, "engine", "zero_stage", 1),
        ([], None, "data", "tokenizer_type", "NullTokenizer"),
        (["--weight-decay", "0.3"], None, "optimizer", "end_weight_decay", 0.3),
        ([], None, "model", "rotary_attention_factor", 1.0),
    ],
)
def test_derived_value(words: list[str], world_size: int | None, section: str, field: str, value: object) -> None:
    assert getattr(getattr(parse_run_config(legal(*words), world_size), section), field) == value


def test_yarn_derives_its_length_and_factor() -> None:
    words = ("--position-embedding-type", "rope", "--rotary-scaling-type", "yarn", "--rotary-scaling-factor", "4")
    model = parse_run_config(legal(*words)).model
    assert model.rotary_original_max_positions == 8
    assert model.rotary_attention_factor == pytest.approx(1.1386294361)  # 0.1 ln 4 + 1


def test_given_values_are_not_derived_again() -> None:
    config = parse_run_config(legal("--max-position-embeddings", "64", "--global-batch-size", "8"), 2)
    assert (config.model.max_position_embeddings, config.training.global_batch_size) == (64, 8)


def test_json_round_trip_gives_the_same_config() -> None:
    config = parse_run_config(legal("--data-path", "a", "b", without="--mock-data"))
    sections = config.to_json()
    assert list(sections) == list(SECTIONS)
    assert RunConfig.from_json(sections) == config
    assert RunConfig.from_json(json.loads(json.dumps(sections))) == config


def test_field_that_an_older_run_lacks_takes_its_default() -> None:
    sections = parse_run_config(LEGAL).to_json()
    del sections["training"]["max_nonfinite_steps"], sections["reporting"]
    assert RunConfig.from_json(sections).training.max_nonfinite_steps == 10


@pytest.mark.parametrize(
    ("section", "field", "value", "sentence"),
    [
        ("model", "num_laers", 3, "'num_laers' is not a field of section 'model'"),
        ("model", "num_layers", "3", "'num_layers' of section 'model': '3' is not an integer"),
        ("model", "num_layers", True, "True is not an integer"),
        ("model", "num_layers", None, "None is not an integer"),
        ("data", "data_path", "a", "'a' is not a list"),
        ("data", "data_path", [1], "[1] is not a list, each a text"),
        ("optimizer", "lr", "1", "'1' is not a number"),
    ],
)
def test_json_that_does_not_fit_is_told(section: str, field: str, value: object, sentence: str) -> None:
    sections = parse_run_config(LEGAL).to_json()
    sections[section][field] = value
    with pytest.raises(ConfigError) as raised:
        RunConfig.from_json(sections)
    assert sentence in str(raised.value)


def test_unknown_and_missing_sections_are_told_together() -> None:
    sections = parse_run_config(LEGAL).to_json()
    del sections["model"]
    sections["modle"] = {}
    with pytest.raises(ConfigError) as raised:
        RunConfig.from_json(sections)
    told = str(raised.value)
    assert "'modle' is not a section" in told
    assert "section 'model' lacks 'num_layers'" in told


def test_build_run_config_derives_and_checks_section_objects() -> None:
    sections = {
        "model": ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2),
        "optimizer": OptimizerConfig(lr=1e-3),
        "data": DataConfig(mock_data=True, vocab_size=9),
    }
    config = build_run_config(**sections, training=TrainingConfig(train_iters=1), world_size=3)
    assert config.training.global_batch_size == 3
    with pytest.raises(ConfigError, match="--train-iters"):
        build_run_config(**sections)


def test_run_config_is_frozen() -> None:
    config = parse_run_config(LEGAL)
    with pytest.raises(AttributeError):
        config.parallel = ParallelConfig()  # type: ignore[misc]


def test_config_error_is_a_user_error_with_every_sentence() -> None:
    error = ConfigError(["one.", "two."])
    assert isinstance(error, UserError)
    assert error.messages == ("one.", "two.")
    assert str(error) == "one.\ntwo."
