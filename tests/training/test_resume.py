"""What each flag of a resume takes of a checkpoint, in one process; tests/layouts/test_resume.py has the layouts."""

import json
import os
import shutil

import pytest

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import open_tensors
from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, losses, run, write_data
from tests.training.starts import is_fresh, is_of, refusal, start

OTHER_SCHEDULE = ["--lr", "5e-3", "--lr-warmup-iters", "0"]
OTHER_DATA = ["--mock-data", "--vocab-size", "64"]
OTHER_TRAINING = ["--hidden-dropout", "0", "--attention-dropout", "0", "--lr", "1", "--global-batch-size", "16"]


def outcomes_of_flags(folder):
    """Train to iteration 8 of 12, with checkpoints at 4 and 8; then start with each flag."""
    data = write_data(folder / "data")
    flags = [*FLAGS, *data]
    saved = str(folder / "saved")
    run([*flags, "--save", saved, "--save-interval", "4", "--exit-interval", "8"])
    load = [*flags, "--load", saved]
    found = {"fresh": start(flags), "resumed": start(load)}
    for name, more in {
        "tag": ["--load-tag", "step_0000004"],
        "no optimizer": ["--no-load-optim"],
        "no streams": ["--no-load-rng"],
        "finetune": ["--finetune"],
        "finetune a tag": ["--finetune", "--load-tag", "step_0000004", "--override-opt_param-scheduler"],
        "flags' schedule": [*OTHER_SCHEDULE, "--override-opt_param-scheduler"],
        "checkpoint's schedule": [*OTHER_SCHEDULE, "--use-checkpoint-opt_param-scheduler"],
        "longer": ["--train-iters", "20", "--override-opt_param-scheduler"],
        "other optimizer": ["--optimizer", "sgd", "--no-load-optim"],
        "other batches": ["--global-batch-size", "4", "--micro-batch-size", "1", "--override-opt_param-scheduler"],
    }.items():
        found[name] = start([*(without_ramp(load) if name == "other batches" else load), *more])
    mock = [*FLAGS, *OTHER_DATA, "--load", saved]
    found["other data"] = start([*mock, "--override-data"])
    found["mock"] = start([*FLAGS, *OTHER_DATA])
    found["finetune on other data"] = start(
        [*mock, "--finetune", "--seq-length", "8", "--max-position-embeddings", "16", "--seed", "7", *OTHER_TRAINING]
    )
    for name, words in {
        "no such tag": [*load, "--load-tag", "step_0000005"],
        "tag elsewhere": [*load, "--load-tag", "../saved/step_0000004"],
        "nothing there": [*flags, "--load", str(folder / "none"), "--exit-on-missing-checkpoint"],
        "other schedule": [*load, *OTHER_SCHEDULE],
        "longer schedule": [*load, "--train-iters", "20"],
        "other model": [*load, "--num-layers", "3", "--normalization", "rmsnorm", "--optimizer", "sgd"],
        "other vocabulary": [*mock, "--vocab-size", "60", "--override-data"],
        "other samples": [*mock, "--seed", "5", "--eod-mask-loss"],
        "finetune another model": [*load, "--finetune", "--num-layers", "3"],
        "finetune in place": [*load, "--finetune", "--save", saved],
        "other optimizer refused": [*load, "--optimizer", "sgd"],
    }.items():
        found[name] = refusal(words)
    found["scratch"] = start([*flags, "--load", str(folder / "none"), "--load-if-exists", "--verify-resume"])
    found |= outcomes_of_saving(folder, flags)
    return found


def without_ramp(words):
    at = words.index("--rampup-batch-size")
    return words[:at] + words[at + 4 :]


def outcomes_of_saving(folder, flags):
    found = {}
    part = str(folder / "part")
    run([*flags, "--save", part, "--no-save-optim", "--no-save-rng", "--exit-interval", "4"])
    tensors = open_tensors(folder / "part" / "step_0000004")
    found["kinds"] = {kind for name in tensors.names for kind in tensors.kinds(name)}
    found["files"] = sorted(path.name for path in (folder / "part" / "step_0000004").iterdir())
    found["part"] = refusal([*flags, "--load", part])
    found["part, no optimizer"] = start([*flags, "--load", part, "--no-load-optim"])
    found["part, finetune"] = start([*flags, "--load", part, "--finetune"])
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    found = run_on_ranks(1, outcomes_of_flags, folder, initialize=False, deepspeed=True)[0]
    return found | {
        "last": folder / "saved" / "step_0000008",
        "first": folder / "saved" / "step_0000004",
        "folder": folder,
    }


def same(one, other, *names):
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_a_resume_takes_everything(outcomes):
    fresh, resumed = outcomes["fresh"], outcomes["resumed"]
    assert (resumed.state.iteration, resumed.state.consumed_samples) == (8, 40)
    assert is_of(resumed, outcomes["last"], weights=True)
    assert is_of(resumed, outcomes["last"], weights=False)
    assert resumed.engine["optimizer"]["step"] == 8
    assert not any(same(fresh, resumed, name) for name in ("rates", "tokens", "draws"))
    assert is_fresh(fresh)
    assert not is_of(fresh, outcomes["last"], weights=True)


def test_load_tag_takes_that_checkpoint(outcomes):
    tag = outcomes["tag"]
    assert tag.state.iteration == 4
    assert is_of(tag, outcomes["first"], weights=True)
    assert is_of(tag, outcomes["first"], weights=False)
    assert not same(tag, outcomes["resumed"], "tokens")


def test_a_tag_that_is_not_there_or_leads_elsewhere_is_an_error(outcomes):
    assert "step_0000005" in outcomes["no such tag"]
    assert "CheckpointError" in outcomes["tag elsewhere"]


def test_no_load_optim_leaves_the_optimizer_alone(outcomes):
    found = outcomes["no optimizer"]
    assert is_fresh(found)
    assert is_of(found, outcomes["last"], weights=True)
    assert same(found, outcomes["resumed"], "state", "rates", "tokens", "draws")


def test_no_load_optim_takes_the_weights_to_another_optimizer(outcomes):
    assert is_of(outcomes["other optimizer"], outcomes["last"], weights=True)
    assert same(outcomes["other optimizer"], outcomes["resumed"], "state", "rates", "tokens")
    assert "--optimizer adam -> sgd" in outcomes["other optimizer refused"]
    assert "--no-load-optim" in outcomes["other optimizer refused"]


def test_no_load_rng_leaves_the_streams_alone(outcomes):
    found = outcomes["no streams"]
    assert same(found, outcomes["resumed"], "state", "rates", "tokens", "engine")
    assert is_of(found, outcomes["last"], weights=False)
    assert found.draws not in (outcomes["resumed"].draws, outcomes["fresh"].draws)
    assert "new random streams begin, which follow from seed, iteration and rank" in found.said


@pytest.mark.parametrize(("name", "checkpoint"), [("finetune", "last"), ("finetune a tag", "first")])
def test_finetune_takes_the_weights_and_nothing_else(outcomes, name, checkpoint):
    found = outcomes[name]
    assert is_of(found, outcomes[checkpoint], weights=True)
    assert is_fresh(found)
    assert same(found, outcomes["fresh"], "state", "rates", "tokens", "draws")


def test_finetune_takes_other_data_batches_lengths_dropout_and_rates(outcomes):
    found = outcomes["finetune on other data"]
    assert is_of(found, outcomes["last"], weights=True)
    assert found.state.iteration == found.state.consumed_samples == 0
    assert len(found.tokens[0]) == 8
    assert "--hidden-dropout 0.1 -> 0.0" in found.said


def test_finetune_needs_the_same_model_and_a_folder_of_its_own(outcomes):
    assert "--num-layers 2 -> 3" in outcomes["finetune another model"]
    assert "--finetune starts a new run" in outcomes["finetune in place"]


def test_another_schedule_is_refused_with_what_differs(outcomes):
    assert (
        "--lr 0.01 -> 0.005, --lr-warmup-init 0.0 -> nothing, --lr-warmup-iters 2 -> nothing"
        in outcomes["other schedule"]
    )
    told = outcomes["longer schedule"]
    assert "--lr-decay-iters (without it --train-iters) 12 -> 20, --train-iters 12 -> 20" in told
    assert "--override-opt-param-scheduler" in told
    assert "--use-checkpoint-opt-param-scheduler" in told


def test_the_schedule_is_the_flags_or_the_checkpoints_as_asked(outcomes):
    resumed = outcomes["resumed"]
    assert same(outcomes["checkpoint's schedule"], resumed, "rates")
    assert outcomes["flags' schedule"].rates[0] != resumed.rates[0]
    assert outcomes["flags' schedule"].rates[0] <= 5e-3
    assert "another schedule from here on: --lr 0.01 -> 0.005" in outcomes["flags' schedule"].said
    assert outcomes["longer"].rates[0] > resumed.rates[0]


def test_a_longer_training_keeps_the_order_of_the_samples(outcomes):
    assert same(outcomes["longer"], outcomes["resumed"], "tokens")
    assert "stays the one that was made for 72, of 136 now" in outcomes["longer"].said


def test_other_batches_go_on_with_the_next_sample(outcomes):
    first, second = (start.tokens for start in (outcomes["resumed"], outcomes["other batches"]))
    assert second == first[:1]
    assert "--global-batch-size 8 -> 4" in outcomes["other batches"].said


def test_other_samples_are_refused_unless_they_are_meant(outcomes):
    for told in (
        "--seed 1234 -> 5",
        "--eod-mask-loss False -> True",
        "data one file -> --mock-data",
        "--override-data",
    ):
        assert told in outcomes["other samples"]
    found = outcomes["other data"]
    assert same(found, outcomes["resumed"], "state", "rates", "draws", "engine")
    assert same(found, outcomes["mock"], "tokens"), "from their first sample on"


def test_the_model_is_compared_at_once(outcomes):
    for told in ("--num-layers 2 -> 3", "--normalization layernorm -> rmsnorm", "--optimizer adam -> sgd"):
        assert told in outcomes["other model"]
    assert "vocabulary 64 -> 60 tokens" in outcomes["other vocabulary"]


def test_a_missing_checkpoint_is_an_error_unless_scratch_is_asked_for(outcomes):
    assert "holds no checkpoint" in outcomes["nothing there"]
    assert same(outcomes["scratch"], outcomes["fresh"], "state", "rates", "tokens", "draws")
    assert "nothing to verify" in outcomes["scratch"].said


def test_no_save_optim_and_no_save_rng_leave_their_parts_out(outcomes):
    assert outcomes["kinds"] == {"weight"}
    assert not [name for name in outcomes["files"] if name.startswith("rng")]
    assert "--no-load-optim" in outcomes["part"]
    found = outcomes["part, no optimizer"]
    assert found.state.iteration == 4
    assert is_fresh(found)
    assert "the checkpoint holds none" in found.said
    assert same(outcomes["part, finetune"], outcomes["fresh"], "state", "tokens", "draws")


class KilledError(Exception):
    """The run is gone, as after SIGKILL."""


def kill_at(iteration):
    def before_step(now):
        if now == iteration:
            raise KilledError

    return before_step


def loaded_wrongly(change):
    """What makes an engine change after it was loaded."""

    def wrong(patch):
        from megatron.engine.flat import FlatEngine

        load = FlatEngine.load

        def load_wrongly(engine, *args, **kwargs):
            load(engine, *args, **kwargs)
            change(engine)

        patch.setattr(FlatEngine, "load", load_wrongly)

    return wrong


def spoiled(kind, factor):
    """What makes a tensor of the optimizer wrong."""

    def change(engine):
        fragment = next(one for one in engine.state_fragments() if one.kind == kind and one.tensor.any())
        fragment.tensor.mul_(factor)

    return loaded_wrongly(change)


def one_sample_too_far(patch):
    from megatron.training.inputs import Inputs

    training = Inputs.training
    patch.setattr(Inputs, "training", lambda inputs, consumed: training(inputs, consumed + 1))


WRONG = {
    # what is wrong, and the parts of the proof that are left out so that the next one sees it
    "as it is": (lambda patch: None, ()),
    "state": (spoiled("exp_avg_sq", 1 + 1e-6), ()),
    "weight": (loaded_wrongly(lambda engine: next(engine.module.parameters()).data.mul_(1.001)), ("verify_state",)),
    "position": (one_sample_too_far, ()),
    "moment": (spoiled("exp_avg", 1.01), ("verify_state",)),
    "next step": (one_sample_too_far, ("verify_samples",)),
}


def verified_runs(folder):
    """A run that is killed some steps behind its checkpoint, and resumed: as it is, and with something wrong."""
    from megatron.training import verify

    flags = [*FLAGS, *write_data(folder / "data"), "--save-interval", "5"]
    lost = folder / "lost"
    run([*flags, "--save", str(folder / "whole")])
    with pytest.raises(KilledError):
        run([*flags, "--save", str(lost)], before_step=kill_at(9))
    found = {}
    for name, (wrong, unseen) in WRONG.items():
        target = folder / name
        shutil.copytree(lost, target)
        before = sorted(os.listdir(target)), (target / "steps.jsonl").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            for part in unseen:
                patch.setattr(verify, part, lambda *args: 0)
            wrong(patch)
            try:
                code = run([*flags, "--save", str(target), "--load", str(target), "--verify-resume"])
            except CheckpointError as error:
                code = str(error)
        found[name] = code, before == (sorted(os.listdir(target)), (target / "steps.jsonl").read_bytes())
    return found, losses(folder / "as it is") == losses(folder / "whole")


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    return run_on_ranks(1, verified_runs, tmp_path_factory.mktemp("verify"), initialize=False, deepspeed=True)[0]


def test_a_verified_resume_is_the_uninterrupted_run(verified):
    found, equal = verified
    assert found["as it is"][0] == 0
    assert equal


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("state", "1 tensors are not what"),
        ("weight", "the loss of the next 2 samples is"),
        ("position", "the loss of the next 2 samples is"),
        ("moment", "iteration 7 has the loss"),
        ("next step", "iteration 6 has the loss"),
    ],
)
def test_what_is_wrong_ends_a_verified_resume_before_anything_of_it_is_saved(verified, wrong, told):
    code, untouched = verified[0][wrong]
    assert str(code).startswith("--verify-resume: ")
    assert told in str(code)
    assert untouched


def tokens_of_steps(flags):
    from megatron.config.run import parse_run_config
    from megatron.engine.launch import read_environment
    from megatron.training.build import build_trainer

    environment = read_environment()
    trainer = build_trainer(parse_run_config(flags, environment.world_size, rank=environment.rank), environment)
    train_step, steps = trainer.engine.train_step, {}

    def noted(micro_batches, **rates):
        steps[trainer.state.iteration] = [batch.tokens.tolist() for batch in micro_batches]
        return train_step(micro_batches, **rates)

    trainer.engine.train_step = noted
    trainer.fit()
    return steps


def in_order(ranks):
    """Put the samples of each step together, over the ranks."""
    return {
        step: [
            sample
            for at_once in zip(*(rank[step] for rank in ranks), strict=True)
            for batch in at_once
            for sample in batch
        ]
        for step in ranks[0]
    }


def test_no_sample_is_skipped_or_repeated_whatever_ranks_and_batches_take_them(tmp_path):
    """During the ramp of the batch, over three epochs, with one rank and two, with micro-batches of 2, 1 and 4."""
    flags = [*FLAGS, *write_data(tmp_path / "data"), "--eval-iters", "0"]
    kept = ["--save", str(tmp_path / "kept"), "--load", str(tmp_path / "kept"), "--load-if-exists"]
    (whole,) = run_on_ranks(1, tokens_of_steps, flags, initialize=False, deepspeed=True)
    parts = {}
    for ranks, size, stop in ((1, 2, 3), (2, 1, 7), (1, 4, 12)):
        words = [*flags, *kept, "--micro-batch-size", str(size), "--exit-interval", str(stop)]
        parts |= in_order(run_on_ranks(ranks, tokens_of_steps, words, initialize=False, deepspeed=True))
    assert parts == in_order([whole])
    assert sorted(parts) == list(range(12))
    assert len(parts[0]) == 4
    assert len(parts[11]) == 8


def test_what_proves_a_resume_is_in_each_checkpoint(outcomes):
    state = json.loads((outcomes["last"] / "state.json").read_text())
    assert set(state["training"]) == {"run", "vocab_size", "next_samples"}
    assert state["training"]["next_samples"]["samples"] == 2
    assert (outcomes["folder"] / "saved" / "steps.jsonl").read_text().count("\n") == 9
