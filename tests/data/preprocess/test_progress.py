import re

from megatron.data.preprocess import progress as module
from megatron.data.preprocess.progress import Progress


def test_a_log_gets_plain_lines_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(40_000_000) as progress:
        progress.skip(10_000_000)
        for seconds in (4, 4, 4, 4):
            now[0] += seconds
            progress.advance(5_000_000, 2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "25.0 of 40.0 MB (62%), 6.00 M tokens, 500,000 tokens/s, 1.25 MB/s, 0:00:12 left",
        "30.0 of 40.0 MB (75%), 8.00 M tokens, 500,000 tokens/s, 1.25 MB/s, 0:00:08 left",
    ]


def test_before_the_first_work_the_time_left_is_unknown():
    assert Progress(1000).describe().endswith("unknown time left")


def test_a_terminal_gets_a_live_line(capsys, monkeypatch):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(2_000_000) as progress:
        progress.advance(1_000_000, 10)
    assert re.search(r"1\.0 of 2\.0 MB", capsys.readouterr().err)
