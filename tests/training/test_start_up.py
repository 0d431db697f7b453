"""What a run tells of its start."""

import re

from megatron.training.start_up import StartUp
from tests.ranks import run_on_ranks
from tests.training.runs import FLAGS, run


def test_every_second_until_the_first_step_belongs_to_a_part():
    now = iter([3.0, 4.5, 8.0, 10.0])
    start = StartUp(1.0, "imports", clock=lambda: next(now))
    for part in ("data", "data", "first step"):
        start.passed(part)
    assert start.describe() == " start: the first step was done after 9.0 s (imports 2.0, data 5.0, first step 2.0)"


def printed_by_a_run(folder):
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run([*FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", "30", "--save", str(folder)])
    return printed.getvalue()


def test_a_run_tells_once_what_it_waited_for_until_its_first_step_was_done(tmp_path):
    (printed,) = run_on_ranks(1, printed_by_a_run, tmp_path, initialize=False, deepspeed=True)
    lines = [line for line in printed.splitlines() if line.startswith(" start:")]
    assert len(lines) == 1
    parts = re.findall(r"(\w[\w ]*) (\d+\.\d)[,)]", lines[0].partition("(")[2])
    assert [name for name, _ in parts] == ["imports", "ranks", "data", "kernels", "model and engine", "first step"]
