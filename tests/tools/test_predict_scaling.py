"""The prediction for more GPUs: its table, what was measured beside it, and words that cannot be read."""

import json

import pytest

MODEL = ["--model", "gpt-1.3b", "--micro-batch-size", "8", "--accumulate", "4", "--tflops", "551.1"]
TP = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture
def tool(monkeypatch):
    from tests.tools.conftest import TOOLS

    monkeypatch.syspath_prepend(str(TOOLS))
    import predict_scaling

    return predict_scaling


def test_layouts_are_lines_of_a_table_and_a_picture(tool, tmp_path, capsys):
    table, picture = tmp_path / "table.json", tmp_path / "table.png"
    layouts = ["--layout", "data parallel:", "--layout", f"TP2: {TP} --accumulate 8"]
    written = ["--json", str(table), "--picture", str(picture)]
    assert tool.main([*MODEL, *layouts, "--ranks", "1,64", "--measured", "data parallel: 1=1007.2", *written]) == 0
    one, many, refused, pairs = json.loads(table.read_text())["rows"]
    assert one["efficiency"] == 1.0
    assert one["ms_per_step"] == pytest.approx(one["measured_ms"], rel=0.001)
    assert many["shares"]["data"] == many["communication"] > 0
    assert many["tokens_per_step"] == 64 * 8 * 4 * 2048
    assert refused["refused"].startswith("this launch has 1 ranks, which is not a multiple of")
    assert pairs["tokens_per_step"] == 32 * 8 * 8 * 2048
    assert pairs["shares"]["tensor"] > 0.1
    assert picture.read_bytes().startswith(b"\x89PNG")
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["layout", "ranks", "ms/step"]
    assert lines[0].split()[-2:] == ["1,007.2", "+0.0%"]
    assert len(lines) == 4


def test_slower_networks_are_predicted_to_be_slower(tool, tmp_path):
    def seconds(*words):
        table = tmp_path / "table.json"
        assert tool.main([*MODEL, "--ranks", "64", "--json", str(table), *words]) == 0
        return json.loads(table.read_text())["rows"][0]["ms_per_step"]

    usual = seconds()
    assert seconds("--network", "10,5") > usual
    assert seconds("--gpus-per-host", "1") > usual
    assert seconds("--local", "27,50") > usual
    assert seconds("--host-ms", "1000") == pytest.approx(usual + 4 * 1000 - 1007.2, rel=0.001)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout", "TP2"], "--layout TP2: write it as"),
        (["--measured", "run: 2"], "--measured run: 2: write it as"),
        (["--measured", "TP: 2=5"], "--measured TP: there is no --layout of that name"),
        (["--tflops", "0"], "--tflops 0.0 must be above 0"),
        (["--layout", "TP2:", "--layout", f"TP2: {TP}"], "--layout TP2: is given twice"),
        (["--num-laers", "3"], "--num-laers"),
        (["--json", "nowhere/table.json"], "--json nowhere/table.json cannot be written"),
        (["--cpu-optimizer"], "--cpu-optimizer makes a step as slow as the host"),
        ([*TP.split(), "--tp-comm-overlap", "copies", "--gpus-per-host", "1"], "2 tensor ranks would be on 2 hosts"),
    ],
)
def test_what_cannot_be_read_or_predicted_is_one_sentence(tool, capsys, words, said):
    assert tool.main([*MODEL, *words]) == 2
    assert said in capsys.readouterr().err
