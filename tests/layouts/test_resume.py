"""What a resume takes in each layout and engine, and under another: bit for bit, or proven within rounding."""

import shlex

import pytest

from tests.layouts.recorded import COMMON, MODELS, record
from tests.layouts.test_fused_kernels import ALL_FUSED
from tests.ranks import run_on_ranks
from tests.training.starts import is_fresh, start
from tests.training.test_resume import KilledError, kill_at

DROPOUT = shlex.split("--hidden-dropout 0.1 --attention-dropout 0.1 --recompute-granularity full")
LAYOUTS = {
    "sequence parallel, ZeRO 1": "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1",
    "tensor parallel, ZeRO 3": "--tensor-model-parallel-size 2 --zero-stage 3",
    "Ulysses, ZeRO 2": "--ds-sequence-parallel-size 2 --zero-stage 2",
    "data parallel, ZeRO 3": "--zero-stage 3",
    "pipeline": "--pipeline-model-parallel-size 2",
}
ADAM = shlex.split("--optimizer adam --lr 1e-2 --min-lr 1e-2 --micro-batch-size 2")


def flags_of(layout, *more):
    return [*MODELS["gpt2"], *ADAM, *shlex.split(LAYOUTS[layout]), *more]


def interrupt_and_resume(folder):
    """Losses straight through, up to the interruption and after it."""
    found = {}
    for name in LAYOUTS:
        flags = flags_of(name, *DROPOUT)
        kept = ["--save", str(folder / name), "--load", str(folder / name), "--load-if-exists", "--verify-resume"]
        runs = [record(flags), record([*flags, *kept, "--exit-interval", "2"]), record([*flags, *kept])]
        found[name] = [run.losses for run in runs]
    return found


def test_a_layout_is_resumed_bit_for_bit_and_proves_it(tmp_path):
    first, second = run_on_ranks(2, interrupt_and_resume, tmp_path, initialize=False, deepspeed=True, timeout=300)
    assert first == second
    for name, (straight, before, after) in first.items():
        assert before + after == straight, name
        assert len(after) == 1


def parts_of_checkpoints(folder):
    """What a run of each engine starts with under the flags that take a part; and a checkpoint without the rest."""
    found = {}
    for name in ("tensor parallel, ZeRO 3", "pipeline"):
        flags = [*COMMON, *flags_of(name, *DROPOUT)]
        save = folder / name
        record([*flags_of(name, *DROPOUT), "--save", str(save), "--save-interval", "1"])
        load = [*flags, "--load", str(save)]
        half = folder / f"{name}, half"
        record([*flags_of(name), "--save", str(half), "--no-save-optim", "--no-save-rng"])
        starts = {
            "fresh": start(flags),
            "resumed": start([*load, "--load-tag", "step_0000002"]),
            "finetune": start([*load, "--load-tag", "step_0000002", "--finetune"]),
            "no optimizer": start([*load, "--load-tag", "step_0000002", "--no-load-optim"]),
            "no streams": start([*load, "--load-tag", "step_0000002", "--no-load-rng"]),
            "half": start([*flags, "--load", str(half), "--no-load-optim"]),
        }
        whole = {key: is_of_shards(one, save / "step_0000002") for key, one in starts.items()}
        summary = {
            key: (one.state.iteration, whole[key], is_fresh(one), one.draws, one.tokens) for key, one in starts.items()
        }
        found[name] = summary, is_of_shards(starts["half"], half / "step_0000003")
    return found


def is_of_shards(started, checkpoint):
    """Whether the weights are a checkpoint's; tensor ranks are compared in their shards."""
    from megatron.checkpoint.fragments import open_tensors

    tensors = open_tensors(checkpoint)
    return all(
        tensor.equal(tensors.read_range(name, kind, started.shardings[name], begin, tensor.numel()))
        for (name, kind, _, begin), tensor in started.kind(weights=True).items()
    )


def test_both_engines_take_the_parts_that_are_asked_for(tmp_path):
    ranks = run_on_ranks(2, parts_of_checkpoints, tmp_path, initialize=False, deepspeed=True, timeout=300)
    for starts, half in (found[name] for found in ranks for name in found):
        assert {name: values[:3] for name, values in starts.items()} == {
            "fresh": (0, False, True),
            "resumed": (2, True, False),
            "finetune": (0, True, True),
            "no optimizer": (2, True, True),
            "no streams": (2, True, False),
            "half": (3, False, True),
        }
        assert half
        draws = {name: values[3] for name, values in starts.items()}
        assert draws["finetune"] == draws["fresh"]
        assert draws["no optimizer"] == draws["resumed"]
        assert len({str(draws[name]) for name in ("fresh", "resumed", "no streams")}) == 3
        tokens = {name: values[4] for name, values in starts.items()}
        assert tokens["finetune"] == tokens["fresh"]
        assert tokens["no optimizer"] == tokens["no streams"] == tokens["resumed"] != tokens["fresh"]


def verify_under_others(folder):
    """What is said to a run that was killed two steps behind its checkpoint, and goes on in each other layout."""
    names = ["sequence parallel, ZeRO 1", "data parallel, ZeRO 3", "pipeline"]
    said = {}
    for before in names:
        flags = [*COMMON, *flags_of(before), "--train-iters", "4"]
        save = str(folder / before)
        with pytest.raises(KilledError):
            run([*flags, "--save", save, "--save-interval", "2"], before_step=kill_at(3))
        for after in names:
            words = [*COMMON, *flags_of(after), "--train-iters", "4", "--load", save, "--verify-resume"]
            said[before, after] = spoken(words)
    return said


def spoken(words):
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run(words) == 0
    return said.getvalue()


def run(words, before_step=None):
    from tests.training.runs import run as train

    return train(words, before_step)


def test_a_resume_is_proven_under_every_other_layout(tmp_path):
    said, _ = run_on_ranks(2, verify_under_others, tmp_path, initialize=False, deepspeed=True, timeout=300)
    for (before, after), text in said.items():
        assert "entries of weights and optimizer state are the checkpoint's, bit for bit" in text
        assert "verified: the loss of the next" in text
        assert "verified: iteration 3 is the recorded one" in text
        assert ("the same training in another layout, equal within rounding" in text) == (before != after)
        if before == after:
            assert "within rounding" not in text


def train_fused(flags):
    from megatron.training import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "choose_kernels", lambda config, device_type: (ALL_FUSED, "fused"))
        return record(flags).losses


def test_fused_dropout_draws_the_masks_of_the_uninterrupted_run_under_another_number_of_tensor_ranks(tmp_path):
    """The streams of a place are those of all its tensor ranks, and fused masks follow from the place in the tensor."""
    flags = [*MODELS["gpt2"], *ADAM, "--hidden-dropout", "0.3", "--zero-stage", "1", "--train-iters", "6"]
    kept = ["--save", str(tmp_path), "--load", str(tmp_path), "--load-if-exists"]
    (whole,) = run_on_ranks(1, train_fused, flags, initialize=False, deepspeed=True)
    (before,) = run_on_ranks(1, train_fused, [*flags, *kept, "--exit-interval", "3"], initialize=False, deepspeed=True)
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    after, _ = run_on_ranks(2, train_fused, [*flags, *kept, *layout], initialize=False, deepspeed=True)
    assert before == whole[:3]
    assert after == pytest.approx(whole[3:], rel=1e-5)
