"""The inspector says what a checkpoint holds, and names every damaged file."""

import pytest

from tests.checkpoint import toy
from tools.inspect_checkpoint import main


@pytest.fixture
def root(tmp_path):
    toy.save(tmp_path, 1, 2)
    return tmp_path


def inspect(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_it_prints_tensors_shapes_shards_step_config_and_sizes(root, capsys):
    code, text = inspect(capsys, root, "--config")
    assert code == 0
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == f"{root}: step_0000001, step_0000002"
    assert lines[1].startswith(f"{root / 'step_0000002'}: 0.000 GB in 5 files")
    assert any(line.startswith("iteration 2, consumed_samples 0, ") for line in lines)
    assert "layout: data_parallel_size 1" in lines
    assert "w 12x8 1 exp_avg float32 in 1, weight float32 in 1" in lines or (
        "w 12x8 1 weight float32 in 1, exp_avg float32 in 1" in lines
    )
    assert any(line.startswith("rng_00000.safetensors") and "bytes" in line for line in lines)
    assert '"num_layers": 2' in text


def test_it_takes_a_checkpoint_or_a_tag_as_well(root, capsys):
    for words in ((root, "--tag", "step_0000001"), (root / "step_0000001",)):
        code, text = inspect(capsys, *words)
        assert code == 0
        assert "iteration 1" in text


def test_it_verifies_and_names_each_damaged_file(root, capsys):
    code, text = inspect(capsys, root, "--verify")
    assert code == 0
    assert "verified: 5 of 5 files whole" in text
    for name in ("tensors_00000_00.safetensors", "rng_00000.safetensors"):
        path = root / "step_0000002" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert inspect(capsys, root)[0] == 0  # it reads no tensor
    code, text = inspect(capsys, root, "--verify")
    assert code == 1
    assert "verified: 3 of 5 files whole" in text
    for name in ("tensors_00000_00.safetensors", "rng_00000.safetensors"):
        assert f"DAMAGED: {root / 'step_0000002' / name} does not have the size and SHA-256" in text


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json", "state.json", "config.json"])
def test_it_names_the_file_that_it_cannot_read(root, capsys, name):
    (root / "step_0000002" / name).write_text("{")
    code, text = inspect(capsys, root)
    assert code == 1
    assert "DAMAGED: " in text
    assert name in text


def test_it_says_where_no_checkpoint_is(tmp_path, root, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert inspect(capsys, empty)[0] == 2
    code, text = inspect(capsys, root, "--tag", "../step_0000001")
    assert code == 2
    assert "is no name of a checkpoint" in text
    code, text = inspect(capsys, root, "--tag", "step_0000007")
    assert code == 2
    assert "there are: step_0000001, step_0000002" in text
