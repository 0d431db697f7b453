from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.run import load_run_config
from tests.config.command_lines import MODEL, legal


def write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


def errors_of(*words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_run_config(legal(*words))
    return str(raised.value)


def test_flat_toml_gives_flags_with_either_spelling(tmp_path: Path) -> None:
    file = write(
        tmp_path, "run.toml", 'lr = 1e-3\ntrain-iters = 9\ndata_path = ["a", "b"]\nswiglu = true\nfp16 = false'
    )
    loaded = load_run_config([*MODEL, "--config", file])
    assert loaded.config.optimizer.lr == 1e-3
    assert loaded.config.training.train_iters == 9
    assert loaded.config.data.data_path == ("a", "b")
    assert loaded.config.model.activation_function == "swiglu"
    assert loaded.config.training.precision == "bf16"
    assert loaded.sources["train_iters"] == f"file {file}"


def test_tables_named_like_sections_are_read(tmp_path: Path) -> None:
    file = write(tmp_path, "run.toml", "[training]\neval_iters = 3\nexit_signal_handler = false\n[optimizer]\nlr = 0.5")
    config = load_run_config(legal("--config", file, without="--lr")).config
    assert (config.training.eval_iters, config.training.exit_signal_handler, config.optimizer.lr) == (3, False, 0.5)


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "run.json", '{"eval_iters": 3, "log_interval": 4}')
    loaded = load_run_config(legal("--config", file, "--eval-iters", "5"))
    assert (loaded.config.training.eval_iters, loaded.config.reporting.log_interval) == (5, 4)
    assert (loaded.sources["eval_iters"], loaded.sources["log_interval"]) == ("flag", f"file {file}")


def test_saved_run_config_is_a_config_file(tmp_path: Path) -> None:
    words = ("--rotary-percent", "0.5", "--position-embedding-type", "rope", "--no-load-rng", "--load", "x")
    config = load_run_config(legal(*words)).config
    file = write(tmp_path, "run_config.json", json.dumps(config.to_json()))
    assert load_run_config(["--config", file]).config == config


def test_unset_values_in_the_file_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, "run.json", '{"save": null, "data_path": []}')
    assert load_run_config(legal("--config", file)).sources["save"] == "default"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("run.json", '{"num_laers": 3}', "--num-laers is not a flag: did you mean --num-layers"),
        ("run.json", '{"eval_iters": "few"}', "--eval-iters: 'few' is not an integer."),
        ("run.json", '{"remote_device": "nvme"}', "offloading to NVMe is not offered"),
        ("run.json", '{"eval_iters": {"a": 1}}', "eval_iters is"),
        ("run.json", '{"print_config": true}', "--print-config belongs on the command line"),
        ("run.json", '{"eval_iters": 3,}', "is not JSON: "),
        ("run.json", "[3]", "is not a dictionary of flags but a list"),
        ("run.toml", "eval_iters = \n", "is not TOML: "),
        ("run.toml", "eval_iters = \n", "line 1"),
        ("run.yaml", "eval_iters: 3", "must end in .json or .toml"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_name(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    told = errors_of("--config", write(tmp_path, name, text))
    assert sentence in told
    assert str(tmp_path / name) in told


def test_missing_file_is_told() -> None:
    assert errors_of("--config", "/none.toml") == "--config /none.toml cannot be read: No such file or directory."
