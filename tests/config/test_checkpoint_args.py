"""`--use-checkpoint-args`: the model's flags come from the checkpoint, and a flag that is given wins."""

import json
import os
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.run import load_run_config

MODEL = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "normalization": "rmsnorm", "norm_epsilon": 1e-6}
DATA = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/some/folder", "vocab_size": 500, "seq_length": 7}


def write(folder: Path, **model: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": MODEL | model, "data": DATA}))
    return folder


def load(root: Path, *words: str):
    return load_run_config(["--use-checkpoint-args", "--load", str(root), "--lr", "1e-3", *words])


def test_model_and_tokenizer_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "step_0000005")
    loaded = load(tmp_path)
    for name, value in MODEL.items():
        assert getattr(loaded.config.model, name) == value
        assert loaded.sources[name] == f"checkpoint {folder}/config.json"
    data = loaded.config.data
    assert (data.tokenizer_type, data.tokenizer_model, data.vocab_size) == tuple(DATA.values())[:3]
    assert data.seq_length == 1024  # not the model's


def test_a_flag_that_is_given_wins_and_a_tokenizer_is_taken_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "step_0000005")
    loaded = load(tmp_path, "--norm-epsilon", "1e-3", "--vocab-size", "600")
    assert loaded.config.model.norm_epsilon == 1e-3
    assert loaded.sources["norm_epsilon"] == "flag"
    assert loaded.config.model.hidden_size == 48
    assert (loaded.config.data.tokenizer_type, loaded.config.data.vocab_size) == ("NullTokenizer", 600)


def test_the_checkpoint_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path / f"step_{step:07d}", num_layers=step)
    assert load(tmp_path).config.model.num_layers == 15
    (tmp_path / "latest").write_text("step_0000010\n")
    assert load(tmp_path).config.model.num_layers == 10
    assert load(tmp_path, "--load-tag", "step_0000005").config.model.num_layers == 5
    assert load(tmp_path / "step_0000005").config.model.num_layers == 5
    write(tmp_path / "outside", num_layers=99)
    for pointer in ("../outside", "", "x" * 500, "..", str(tmp_path / "outside"), "step_0000010/../../outside"):
        (tmp_path / "step_0000015" / "latest").write_text(pointer)
        (tmp_path / "latest").write_text(pointer)
        assert load(tmp_path).config.model.num_layers == 15


def test_nothing_is_read_outside_of_the_folder_and_no_pipe_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "run" / "step_0000005")
    write(tmp_path / "outside", num_layers=99)
    for tag in ("../outside", str(tmp_path / "outside"), "..", ""):
        with pytest.raises(ConfigError, match=r"holds no checkpoint with a config\.json"):
            load(tmp_path / "run", "--load-tag", tag)
    pointer = tmp_path / "run" / "latest"
    os.mkfifo(pointer)
    assert load(tmp_path / "run").config.model.num_layers == 3
    pointer.unlink()
    pointer.symlink_to("/dev/zero")
    assert load(tmp_path / "run").config.model.num_layers == 3


def test_what_is_wrong_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--use-checkpoint-args has no effect without --load"):
        load_run_config(["--use-checkpoint-args", "--lr", "1e-3"])
    with pytest.raises(ConfigError, match=r"holds no checkpoint with a config\.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="--num-layers, --hidden-size, --num-attention-heads: required"):
        load(tmp_path, "--load-if-exists")
    folder = write(tmp_path / "step_0000005", num_layers="three")
    with pytest.raises(ConfigError, match=r"'num_layers' in .*config\.json: 'three' is not an integer"):
        load(tmp_path)
    for content in ("{", "[]", '{"model": 1, "data": {}}', '{"model": {}}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json is no config of a run"):
            load(tmp_path)
