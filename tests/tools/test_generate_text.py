import io

import pytest

from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, run
from tools import generate_text


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("generate") / "run")
    flags = [*FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", "3", "--save", folder]
    run_on_ranks(1, run, flags, initialize=False, deepspeed=True)
    return folder


def generated(capsys, *flags):
    code = generate_text.main(list(flags))
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_prompts_are_continued_alike_from_every_source(checkpoints, capsys, tmp_path, monkeypatch):
    flags = ["--load", checkpoints, "--max-new-tokens", "4", "--greedy", "--device", "cpu"]
    code, both, _ = generated(capsys, *flags, "--prompt", "1 2 3", "--prompt", "7")
    assert code == 0
    assert [line.startswith(prompt) for line, prompt in zip(both, ("1 2 3 ", "7 "), strict=True)] == [True, True]
    assert [len(line.split()) <= length for line, length in zip(both, (7, 5), strict=True)] == [True, True]
    (tmp_path / "prompts").write_text("1 2 3\n7\n")
    assert generated(capsys, *flags, "--prompt-file", str(tmp_path / "prompts"))[1] == both
    monkeypatch.setattr("sys.stdin", io.StringIO("7\n"))
    assert generated(capsys, *flags)[1] == both[1:]


def test_draws_depend_on_the_seed_alone(checkpoints, capsys):
    flags = ["--load", checkpoints, "--prompt", "1", "--max-new-tokens", "8", "--device", "cpu", "--top-k", "40"]
    first, again, other = (generated(capsys, *flags, "--seed", seed)[1] for seed in ("0", "0", "1"))
    assert first == again
    assert first != other


def test_what_is_wrong_is_a_sentence(checkpoints, capsys, tmp_path):
    code, _, error = generated(capsys, "--load", str(tmp_path), "--prompt", "1")
    assert code == 2
    assert "holds no checkpoint" in error
    assert generated(capsys, "--load", checkpoints, "--prompt-file", str(tmp_path / "none"))[0] == 2
    assert generated(capsys, "--load", checkpoints, "--prompt", "1", "--top-p", "2", "--device", "cpu")[0] == 2
