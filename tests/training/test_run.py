"""Whole runs: what is resumed is what was interrupted, and every way to end has its exit code."""

import os
import signal

import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.config.errors import UserError
from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, is_rank, losses, run, write_data


def interrupted_and_resumed(folder, stages):
    """Train straight through, and again with interruptions, for each ZeRO stage; gives exit codes and losses."""
    data = write_data(folder / f"data_{os.environ['RANK']}")
    outcomes = []
    for stage in stages:
        whole, parts = folder / f"whole_{stage}", folder / f"parts_{stage}"
        flags = [*FLAGS, *data, "--zero-stage", str(stage)]
        again = [*flags, "--save", str(parts), "--load", str(parts), "--load-if-exists", "--save-interval", "3"]

        def ask_rank_to_stop(iteration):
            if iteration == 4 and is_rank(int(os.environ["WORLD_SIZE"]) - 1):
                os.kill(os.getpid(), signal.SIGTERM)

        codes = [
            run([*flags, "--save", str(whole)]),
            run(again, before_step=ask_rank_to_stop),  # saves iteration 5
            run([*again, "--exit-interval", "7"]),
            run(again),
        ]
        outcomes.append((codes, *(losses(path, kind) for kind in ("train", "evaluation") for path in (whole, parts))))
    return outcomes


@pytest.mark.parametrize(("ranks", "stages"), [(1, [0]), (2, [1])])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, ranks, stages):
    """Mid-epoch, during and after the ramp of the batch, dropout on; a signal to one rank and an exit interval."""
    for codes, whole, parts, whole_valid, parts_valid in run_on_ranks(
        ranks, interrupted_and_resumed, tmp_path, stages, initialize=False, deepspeed=True
    )[0]:
        assert codes == [0, 143, 0, 0]
        assert sorted(whole) == list(range(1, 13))
        assert len(set(whole.values())) == 12
        assert parts == whole
        assert parts_valid == whole_valid


def outcomes_of_one_rank(folder):
    """Every other way to end: what it gave, by name."""
    flags = [*FLAGS, "--mock-data", "--vocab-size", "64"]

    def message(*more):
        try:
            return run([*flags, *more])
        except UserError as error:
            return f"{type(error).__name__}: {error}"

    def folders(name):
        return sorted(path.name for path in (folder / name).glob("step_*"))

    found = {}
    save = str(folder / "kept")
    run([*flags, "--save", save, "--save-interval", "2", "--keep-last", "2"])
    found["kept"] = folders("kept")
    found["nothing left to do"] = run([*flags, "--save", save, "--load", save]), folders("kept")
    found["missing"] = message("--load", str(folder / "nowhere"))
    found["foreign"] = message("--save", save)
    found["other model"] = message("--load", save, "--num-layers", "3", "--hidden-size", "64")
    found["evaluation only"] = run([*flags, "--load", save, "--skip-train", "--metrics-file", str(folder / "e.jsonl")])
    switch = folder / "stop"
    code = run(
        [*flags, "--save", str(folder / "switched"), "--kill-switch-file", str(switch)],
        before_step=lambda iteration: switch.touch() if iteration == 2 else None,
    )
    found["kill switch"] = code, folders("switched")
    bad = ["--lr", "1e30", "--min-lr", "1e30", "--lr-decay-style", "constant", "--lr-warmup-iters", "0"]
    bad += ["--save", str(folder / "bad"), "--save-interval", "1", "--max-nonfinite-steps", "3"]
    found["bad"] = run([*flags, *bad]), folders("bad")
    found["bad losses"] = losses(folder / "bad")
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = run_on_ranks(1, outcomes_of_one_rank, folder, initialize=False, deepspeed=True)[0]
    return found | {"folder": folder}


def test_last_checkpoints_are_kept(outcomes):
    assert outcomes["kept"] == ["step_0000010", "step_0000012"]


def test_finished_run_has_nothing_left_to_do(outcomes):
    assert outcomes["nothing left to do"] == (0, outcomes["kept"])


def test_missing_checkpoint_is_an_error(outcomes):
    assert outcomes["missing"].startswith(CheckpointError.__name__)
    assert "--load-if-exists" in outcomes["missing"]


def test_checkpoints_of_another_run_are_not_overwritten(outcomes):
    assert "checkpoints of another run, up to iteration 12" in outcomes["foreign"]


def test_checkpoint_of_another_model_names_every_difference(outcomes):
    assert "--num-layers 2 -> 3" in outcomes["other model"]
    assert "--hidden-size 32 -> 64" in outcomes["other model"]


def test_evaluation_alone_gives_the_loss_at_the_end_of_the_training(outcomes):
    assert outcomes["evaluation only"] == 0
    (outcomes["folder"] / "e").mkdir()
    (outcomes["folder"] / "e.jsonl").rename(outcomes["folder"] / "e" / "metrics.jsonl")
    assert losses(outcomes["folder"] / "e", "evaluation")[12] == losses(outcomes["folder"] / "kept", "evaluation")[12]


def test_kill_switch_saves_and_leaves_with_0(outcomes):
    assert outcomes["kill switch"] == (0, ["step_0000003"])


def test_streak_of_bad_steps_leaves_with_17_and_no_bad_step_is_saved(outcomes):
    assert outcomes["bad"] == (17, ["step_0000001"])
    assert list(outcomes["bad losses"].values())[-3:] == ["none"] * 3
    assert outcomes["bad losses"][1] != "none"
