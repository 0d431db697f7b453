"""`finetune_hf.sh` goes on with a model of Hugging Face, resumes, and writes one again."""

import pytest

from megatron.convert.hugging_face.importing import import_model
from tests.convert.hugging_face.models import write_model
from tests.examples.test_scripts import FINETUNE, flags_after_entry_script, run_script
from tests.ranks import run_on_ranks
from tests.training.runs import losses, run, write_data

transformers = pytest.importorskip("transformers")


def test_without_a_model_it_says_what_to_set():
    result = run_script(FINETUNE)
    assert result.returncode == 2
    assert result.stderr == "error: no model. Set HF_MODEL to a folder with config.json and safetensors\n"


def test_a_model_without_data_is_imported_and_given_the_text_that_is_there():
    printed = run_script(FINETUNE, HF_MODEL="models/some", NUM_GPUS="1").stdout
    assert "output/imported/some/data/python_text_document" in printed.splitlines()


def test_model_is_trained_resumed_and_written_again_whatever_the_layout(tmp_path):
    model, save = write_model(tmp_path / "theirs", "llama tied"), tmp_path / "run"
    import_model(model, tmp_path / "imported")
    _, prefix, *_ = write_data(tmp_path / "data")

    def flags(**variables):
        own = {"HF_MODEL": str(model), "IMPORTED": str(tmp_path / "imported"), "DATA_PATH": prefix, "SAVE": str(save)}
        words = [
            "--precision",
            "fp32",
            "--global-batch-size",
            "4",
            "--log-interval",
            "1",
            "--eval-iters",
            "0",
            "--num-workers",
            "0",
        ]
        done = run_script(FINETUNE, *words, NUM_GPUS="2", SEQ_LENGTH="16", **own, **variables)
        assert done.returncode == 0, done.stderr
        return flags_after_entry_script(done.stdout)

    first = flags(TENSOR_PARALLEL="2", TRAIN_ITERS="2")
    assert "--finetune" in first
    assert run_on_ranks(2, run, first, initialize=False, deepspeed=True) == [0, 0]
    again = flags(TENSOR_PARALLEL="1", TRAIN_ITERS="3")
    assert "--finetune" not in again
    schedule = ["--override-opt_param-scheduler"]  # that of three steps instead of two
    assert run_on_ranks(2, run, [*again, *schedule], initialize=False, deepspeed=True) == [0, 0]
    assert sorted(losses(save)) == [1, 2, 3]
    written = transformers.AutoModelForCausalLM.from_pretrained(save / "hf" / "step_0000003")
    assert written.config.model_type == "llama"
