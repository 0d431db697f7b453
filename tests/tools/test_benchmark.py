"""The benchmark of whole runs: its table on a CPU, its sweeps, and runs that fail as rows."""

import json
import shlex

import pytest

TINY = shlex.split("--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --vocab-size 64 --steps 2")
GPT = ["--model", "gpt-1.3b"]


@pytest.fixture
def tool(monkeypatch):
    from tests.tools.conftest import TOOLS

    monkeypatch.syspath_prepend(str(TOOLS))
    import benchmark

    return benchmark


def test_a_sweep_trains_each_row_and_a_refused_one_is_a_row(tool, tmp_path, capsys):
    table, picture = tmp_path / "table.json", tmp_path / "table.png"
    own = ["--ranks", "2", "--accumulate", "2", "--json", str(table), "--picture", str(picture)]
    assert tool.main([*own, *TINY, "--sweep", "tensor-model-parallel-size=2,3"]) == 1
    measured, refused = json.loads(table.read_text())["rows"]
    assert measured["swept"] == {"tensor-model-parallel-size": "2"}
    assert measured["attention"] == "sdpa"
    assert measured["ms_per_step"] > 0
    tokens = 2 * 16 / (measured["ms_per_step"] / 1e3) / 2
    assert measured["tokens_per_second_per_gpu"] == pytest.approx(tokens, rel=0.01)
    matrices = 2 * 12 * 32 * 32 + 128 * 32
    full, causal = (6 * matrices + share * 12 * 2 * 32 * 16 for share in (1, 0.5))
    assert measured["tflops_full"] == pytest.approx(tokens * full / 1e12, rel=0.01)
    assert measured["tflops_causal"] == pytest.approx(tokens * causal / 1e12, rel=0.01)
    assert 0 < measured["lm_loss"] < 10
    assert 0 < measured["overhead_ms_per_step"] < measured["ms_per_step"]
    waits = [measured[f"{name}_ms_per_step"] for name in ("data", "agreement")]
    assert min(waits) > 0
    assert sum(waits) < measured["overhead_ms_per_step"]
    assert refused["error"].startswith("refused: --num-attention-heads 2 is not a multiple of")
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:2] == ["tensor-model-parallel-size", "ms/step"]


def test_memory_is_predicted_without_a_run(tool, tmp_path):
    table = tmp_path / "table.json"
    sweep = ["--sweep", "seq=2k,...,8k", "--sweep", "recompute-granularity=none,full", "--json", str(table)]
    assert tool.main([*GPT, "--predict", *sweep]) == 0
    rows = json.loads(table.read_text())["rows"]
    assert [tuple(row["swept"].values()) for row in rows] == [
        (length, policy) for length in ("2048", "4096", "8192") for policy in ("none", "full")
    ]
    peaks = [row["predicted_gib"] for row in rows]
    assert peaks[0] < peaks[2] < peaks[4]
    assert all(kept > recomputed for kept, recomputed in zip(peaks[::2], peaks[1::2], strict=True))


def test_memory_that_runs_out_is_a_row(tool, tmp_path, monkeypatch, capsys):
    from megatron.engine import local_ranks

    endings = iter(
        ["rank 0: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB", "rank 1: ValueError: other"]
    )

    def fail(*_, **__):
        raise local_ranks.RankFailedError(next(endings))

    monkeypatch.setattr(local_ranks, "run_local_ranks", fail)
    assert tool.main([*TINY, "--json", str(tmp_path / "a.json")]) == 0
    assert "out of memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["error"] == "out of memory"
    assert tool.main(TINY) == 1
    told = capsys.readouterr()
    assert "rank 1: ValueError: other" in told.out
    assert "rank 1: ValueError: other" in told.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sweep", "seq"], "--sweep seq: write it as NAME=A,B,..."),
        (["--sweep", "seq=8k..2k"], "--sweep seq=8k..2k: write it as"),
        (["--no-such-flag"], "--no-such-flag is not a flag"),
        (["--zero-stage", "1", "--global-batch-size", "3", "--ranks", "2"], "--global-batch-size 3 is not a multiple"),
    ],
)
def test_wrong_words_are_told_in_a_sentence(tool, words, sentence, capsys):
    assert tool.main([*GPT, "--predict", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_values_of_a_sweep_double_and_are_read_with_units(tool):
    assert tool.parse_sweep("seq=2k,...,16k") == ("seq-length", ["2048", "4096", "8192", "16384"])
    assert tool.parse_sweep("mbs=1,2,4") == ("micro-batch-size", ["1", "2", "4"])
    assert tool.parse_sweep("precision=bf16,fp16") == ("precision", ["bf16", "fp16"])
    assert tool.parse_sweep("seq=1M")[1] == [str(2**20)]


def test_named_models_are_those_of_the_scripts(tool):
    from model_shapes import SHAPES, shape_flags

    from megatron.config.run import load_run_config
    from tests.examples.test_scripts import EXAMPLES, flags_after_entry_script, run_script

    compared = 0
    for name in SHAPES:
        script = (
            EXAMPLES
            / f"pretrain_{name.replace('-', '_').replace('m', 'M').replace('b', 'B').replace('llaMa', 'llama')}.sh"
        )
        if script.exists():
            flags = flags_after_entry_script(run_script(script, NUM_GPUS="8").stdout)
            shape = load_run_config([*shlex.split(tool.DEFAULTS), *shape_flags(name)]).config.model
            trained = load_run_config(flags).config.model
            sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "normalization")
            assert [getattr(shape, size) for size in sizes] == [getattr(trained, size) for size in sizes], name
            compared += 1
    assert compared == 9


@pytest.mark.parametrize(("asked", "warm_up"), [(["--warm-up", "0"], 0), (["--warm-up", "2"], 2), ([], 1)])
def test_steps_that_warm_up_are_as_many_as_asked_and_told(tool, tmp_path, asked, warm_up):
    table = tmp_path / "table.json"
    assert tool.main([*TINY, "--steps", "1", *asked, "--json", str(table)]) == 0
    (row,) = json.loads(table.read_text())["rows"]
    assert (row["steps"], row["warm_up_steps"]) == (1, warm_up)
    assert row["ms_per_step"] > 0


def test_steps_that_warm_up_are_whole_intervals(tool, capsys):
    assert tool.main([*TINY, "--steps", "2", "--warm-up", "3"]) == 2
    assert "--warm-up 3 is no multiple of --steps 2" in capsys.readouterr().err
