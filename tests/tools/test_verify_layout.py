import json
import shlex

import pytest

from tools import verify_layout

RUN = shlex.split(
    """
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --vocab-size 50257 --mock-data
    --train-iters 10 --lr 1e-3 --precision fp32 --hidden-dropout 0 --attention-dropout 0
    """
)
SHARDED = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


def test_one_command_certifies_a_layout_and_writes_what_it_found(tmp_path, capsys):
    file = tmp_path / "certificate.json"
    own = ["--ranks", "2", "--steps", "2", "--json", str(file)]
    assert verify_layout.main([*own, *RUN, *SHARDED]) == 0
    printed = capsys.readouterr().out
    assert "EQUAL (" in printed
    assert "hidden_size 768 -> 32" in printed
    content = json.loads(file.read_text())
    assert content["equal"] is True
    assert content["ranks"] == 2
    compared = {(found["what"], found["name"]) for found in content["findings"]}
    assert {("loss", "step 2"), ("gradient", "2.attention.qkv.weight"), ("travel", "4.weight")} <= compared


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--zero-stage", "9"], "--zero-stage: '9' is not one of"),
        (["--no-such-flag"], "--no-such-flag is not a flag"),
        (["--ranks", "3", *SHARDED], "this launch has 3 ranks, which is not a multiple of"),
        (["--ranks", "0"], "0 is not at least 1"),
    ],
)
def test_bad_flags_are_told_in_a_sentence_and_exit_with_2(words, sentence, capsys):
    try:
        code = verify_layout.main([*RUN, *words])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert sentence in capsys.readouterr().err
