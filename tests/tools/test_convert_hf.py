import builtins
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron.config.model import ModelConfig
from tests.convert.hugging_face.models import change_json, weights_in, write_model
from tools import convert_hf

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("convert") / "theirs", "qwen3 tied", torch.bfloat16)


def converted(capsys, *words):
    capsys.readouterr()
    code = convert_hf.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_there_and_back(theirs, tmp_path, capsys):
    ours, again = tmp_path / "ours", tmp_path / "again"
    code, out, _ = converted(capsys, "import", "--hf", theirs, "--save", ours)
    assert code == 0
    assert "logits agree: largest difference" in out
    assert "GiB of memory; --no-check leaves it out" in out
    assert "--num-layers 2" in out
    assert "--precision bf16" in out
    assert "--use-checkpoint-args" in out
    code, out, _ = converted(capsys, "export", "--load", ours, "--hf", again, "--max-shard-size", "20KB")
    assert code == 0
    assert "qwen3, " in out
    assert "in bf16" in out
    assert "logits agree" in out
    before, after = weights_in(theirs), weights_in(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in before.values())
    code, _, err = converted(capsys, "export", "--load", ours, "--hf", tmp_path / "b", "--load-tag", "step_0000003")
    assert code == 2
    assert "step_0000003" in err
    assert converted(capsys, "export", "--load", tmp_path, "--hf", tmp_path / "b", "--no-check")[0] == 2


def test_logits_that_differ_are_an_exit_code(theirs, tmp_path, capsys):
    """A config that hides what the tensors do not show: another base of the rotation, after the import."""
    folder = shutil.copytree(theirs, tmp_path / "theirs")
    assert converted(capsys, "import", "--hf", folder, "--save", tmp_path / "ours", "--no-check")[:1] == (0,)
    config = tmp_path / "ours" / "step_0000000" / "config.json"
    values = json.loads(config.read_text())
    values["model"]["rotary_base"] = 77.0
    found = convert_hf.check(
        convert_hf.parse(["import", "--hf", str(folder), "--save", str(tmp_path)]),
        folder,
        config.parent,
        ModelConfig(**values["model"]),
        1000,
        "fp32",
    )
    assert found == 1
    assert "logits DIFFER: largest difference" in capsys.readouterr().out


def test_without_transformers_a_sentence_says_what_to_do(theirs, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = converted(capsys, "import", "--hf", theirs, "--save", tmp_path / "ours")
    assert code == 2
    assert "pip install megatron-deepspeed[hf], or add --no-check" in err
    assert not (tmp_path / "ours").exists()
    code, out, _ = converted(capsys, "import", "--hf", theirs, "--save", tmp_path / "ours", "--no-check")
    assert code == 0
    assert "logits" not in out


def test_what_cannot_be_converted_is_a_sentence(theirs, tmp_path, capsys):
    folder = shutil.copytree(theirs, tmp_path / "theirs")
    change_json(folder / "config.json", model_type="mamba")
    code, _, err = converted(capsys, "import", "--hf", folder, "--save", tmp_path / "ours", "--no-check")
    assert (code, err.count("\n")) == (2, 1)
    assert "model_type 'mamba' cannot be converted" in err
    save_file({}, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        convert_hf.parse(["export", "--load", "a", "--hf", "b", "--max-shard-size", "big"])


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("1.5MiB", 3 * 2**19), ("20kb", 20_000), ("7", 7)])
def test_sizes_are_read(text, count):
    assert convert_hf.byte_count(text) == count
