"""Every script in examples_deepspeed/ trains on two CPU processes, with its layout and switches and a tiny shape."""

import math
import shlex

import pytest

from tests.examples.test_scripts import EXAMPLES, SCRIPTS, flags_after_entry_script, run_script
from tests.ranks import run_on_ranks
from tests.training.runs import losses, run, write_data

TINY = shlex.split(
    """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8 --make-vocab-size-divisible-by 16
    --tokenizer-type NullTokenizer --global-batch-size 4 --eval-interval 2 --eval-iters 1 --log-interval 1
    --num-workers 0 --lr 1e-2
    """
)
PRETRAIN = [script for script in SCRIPTS if script.stem.startswith("pretrain_")]
LAYOUTS = {
    "pretrain_gpt_6.7B": "--tensor-model-parallel-size 2",
    "pretrain_gpt_30B": "--tensor-model-parallel-size 2",
    "pretrain_gpt_13B_pipeline": "--pipeline-model-parallel-size 2",
    "pretrain_gpt_1.3B_ulysses": "--ds-sequence-parallel-size 2",
    "pretrain_gpt_13B_offload": "--zero-stage 3",
}
"""What some scripts must still show when there are two GPUs."""


@pytest.mark.parametrize("script", PRETRAIN, ids=lambda path: path.stem.removeprefix("pretrain_"))
def test_script_trains_when_scaled_down(script, tmp_path):
    _, prefix, *data = write_data(tmp_path / "data")
    scaled = {"NUM_GPUS": "2", "SEQ_LENGTH": "32", "MICRO_BATCH": "1", "TRAIN_ITERS": "3"}
    done = run_script(script, *TINY, *data, DATA_PATH=prefix, SAVE=str(tmp_path / "run"), **scaled)
    assert done.returncode == 0, done.stderr
    flags = flags_after_entry_script(done.stdout)
    assert LAYOUTS.get(script.stem, "") in shlex.join(flags)
    assert run_on_ranks(2, run, flags, initialize=False, deepspeed=True) == [0, 0]
    found = [float.fromhex(loss) for loss in losses(tmp_path / "run").values()]
    assert len(found) == 3
    assert all(map(math.isfinite, found))


def test_ranks_of_a_layer_are_halved_until_they_divide_those_of_a_machine():
    def tensor_ranks(number, script="gpt_13B"):
        flags = flags_after_entry_script(run_script(EXAMPLES / f"pretrain_{script}.sh", NUM_GPUS=str(number)).stdout)
        return flags[flags.index("--tensor-model-parallel-size") + 1]

    assert [tensor_ranks(number) for number in (1, 2, 4, 6, 8)] == ["1", "2", "4", "2", "4"]
    assert [tensor_ranks(number, "gpt_13B_pipeline") for number in (2, 4, 8)] == ["1", "2", "4"]


def test_data_is_the_quickstarts_and_a_few_steps_unless_some_is_named(tmp_path):
    script = EXAMPLES / "pretrain_gpt_350M.sh"

    def flags(*words, **variables):
        return shlex.join(flags_after_entry_script(run_script(script, *words, **variables).stdout))

    assert "quickstart/data/python_text_document" in flags()
    assert "--train-iters 100 " in flags()
    own = flags(DATA_PATH="text", TOKENIZER_MODEL="pieces.model")
    assert "--data-path text --tokenizer-type SentencePieceTokenizer --tokenizer-model pieces.model" in own
    assert "--train-iters 13542 " in own
    pairs = flags(DATA_PATH="text", VOCAB_FILE="vocab.json", MERGE_FILE="merges.txt")
    assert "--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt" in pairs
    assert "--data-path" not in flags("--mock-data", "--vocab-size", "64")
    assert "--save" not in flags(SAVE="")


def test_without_data_a_script_says_how_to_get_some(tmp_path):
    for name in ("pretrain.sh", "launch.sh", "pretrain_gpt_350M.sh"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
        (tmp_path / name).chmod(0o755)
    result = run_script(tmp_path / "pretrain_gpt_350M.sh", DRY_RUN="")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no data. Set DATA_PATH and TOKENIZER_MODEL")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "counted"),
    [({"NUM_GPUS": "4"}, "1 4"), ({"NUM_GPUS": "8", "LAUNCHER": "srun", "NUM_NODES": "3"}, "3 8")],
)
def test_launcher_counts_what_it_would_start(variables, counted):
    assert run_script(EXAMPLES / "launch.sh", "--count", **variables).stdout.strip() == counted
