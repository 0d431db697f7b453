"""Copies of checkpoints for transformers: made while the training goes on, and never in its way."""

import threading
from pathlib import Path

import pytest

from megatron.checkpoint.store import Saved
from megatron.config.data import DataConfig
from megatron.config.errors import UserError
from megatron.training.hugging_face import HuggingFaceCopies, build_export
from tests.model.tiny import LLAMA, tiny_config


class Writer:
    """Saves folders; in the background it tells of each one call later."""

    def __init__(self, root: Path, *, background: bool) -> None:
        self.root, self.background = root, background
        self.under_way: list[Saved] = []
        self.calls: list[str] = []

    def save(self, _, step):
        self.calls.append("save")
        done = self.finish() if self.background else []
        path = self.root / f"step_{step:07d}"
        path.mkdir(parents=True)
        self.under_way = [Saved(path=path, iteration=step, num_bytes=1, seconds=1.0, stalled=0.0)]
        return done if self.background else self.finish()

    def poll(self):
        return self.finish() if self.background else []

    def finish(self):
        done, self.under_way = self.under_way, []
        return done

    def close(self):
        self.calls.append("close")


@pytest.fixture
def told():
    return []


def export(source, target):
    assert source.is_dir()
    target.mkdir(parents=True)
    return "a model"


@pytest.mark.parametrize("background", [False, True])
def test_what_became_complete_is_copied_and_told(tmp_path, told, background):
    copies = HuggingFaceCopies(Writer(tmp_path, background=background), tmp_path, export, told.append)
    saved = [*copies.save(None, 5), *copies.poll(), *copies.save(None, 10), *copies.finish()]
    assert [one.iteration for one in saved] == [5, 10]
    assert told == [f" saved {tmp_path}/hf/step_{step:07d}: a model" for step in (5, 10)]


def test_training_goes_on_while_a_copy_is_made_and_the_next_save_waits_for_it(tmp_path, told):
    may_end = threading.Event()

    def slow(source, target):
        assert may_end.wait(20)
        assert source.is_dir()
        return export(source, target)

    writer = Writer(tmp_path, background=False)
    copies = HuggingFaceCopies(writer, tmp_path, slow, told.append)
    copies.save(None, 5)
    assert copies.poll() == []  # the copy of step 5 is under way
    assert told == []
    threading.Timer(0.2, may_end.set).start()
    copies.save(None, 10)
    assert (told, writer.calls) == ([f" saved {tmp_path}/hf/step_0000005: a model"], ["save", "save"])
    copies.finish()
    assert len(told) == 2


def test_a_copy_goes_with_its_checkpoint_and_one_half_made_goes_too(tmp_path, told):
    copies = HuggingFaceCopies(Writer(tmp_path, background=False), tmp_path, export, told.append)
    for step in (5, 10):
        copies.save(None, step)
    copies.finish()
    (tmp_path / "step_0000005").rmdir()
    (tmp_path / "hf" / "notes").mkdir()
    (tmp_path / "hf" / ".step_0000012.staging").mkdir()  # of a run that was killed
    copies.save(None, 15)
    copies.finish()
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["notes", "step_0000010", "step_0000015"]


@pytest.mark.parametrize("error", [UserError("no family"), OSError("no space"), RuntimeError("torch")])
def test_a_copy_that_fails_is_told_and_the_training_goes_on(tmp_path, told, error):
    def fails(source, target):
        raise error

    writer = Writer(tmp_path, background=False)
    copies = HuggingFaceCopies(writer, tmp_path, fails, told.append)
    assert len(copies.save(None, 5)) == 1
    copies.finish()
    copies.close()
    assert told == [f" not saved: {tmp_path}/hf/step_0000005: {error}"]
    assert writer.calls == ["save", "close"]


def test_a_model_that_no_family_has_is_refused_before_the_training():
    with pytest.raises(UserError, match="no family of Hugging Face has what this model has"):
        build_export(tiny_config(**LLAMA, attention_softcap=3.0), DataConfig(), "bf16")
