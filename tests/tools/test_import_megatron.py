"""The command line that imports checkpoints of the older systems."""

import shlex

from megatron.checkpoint.fragments import open_tensors
from megatron.config.run import load_run_config
from tests.convert.older.engine_writer import write_flat_engine
from tests.convert.older.older_writer import Layout, make_original, write_megatron_lm
from tests.convert.older.test_importing import GPT_2
from tools.convert_checkpoint.import_megatron import main


def test_it_writes_a_checkpoint_and_prints_how_to_go_on(tmp_path, capsys):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout(tensor=2))
    assert main([str(folder), "--save", str(tmp_path / "new")]) == 0
    said, command = capsys.readouterr().out.splitlines()[::2]
    assert "weights and Adam's state of iteration 100, 800 samples" in said
    script, *flags = shlex.split(command)[1:]
    assert script == "pretrain_gpt.py"
    assert load_run_config(flags).config.checkpoint.load == str(tmp_path / "new")
    assert (tmp_path / "new" / "latest").read_text().strip() == "step_0000100"


def test_notes_go_to_the_other_stream(tmp_path, capsys):
    folder = write_flat_engine(
        make_original(GPT_2), tmp_path / "old", Layout(data=2), 1, embedding_weights_in_fp32=True
    )
    assert main([str(folder), "--save", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().err.startswith("Note: Its embedding was computed in fp32")


def test_a_refusal_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path), "--save", str(tmp_path / "new")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "mp_rank_00" in sentence
    assert not (tmp_path / "new").exists()


def test_weights_alone_leave_the_optimizer(tmp_path, capsys):
    folder = write_megatron_lm(make_original(GPT_2), tmp_path / "old", Layout())
    assert main([str(folder), "--save", str(tmp_path / "new"), "--weights-only"]) == 0
    assert open_tensors(tmp_path / "new" / "step_0000100").kinds("6.weight") == ("weight",)
    assert capsys.readouterr().out.rstrip().endswith("--no-load-optim")
