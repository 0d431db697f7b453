"""Kill -9 a real run of two ranks at random moments, resume it each time, and compare every loss bit for bit.

    python tests/faults/kill_soak.py --step-kills 10 --save-kills 10

A run is killed in the middle of a step or of a save until it has come to its end, then the next run starts; in each
life a random rank dies first and the other is left to find out. A run's losses must be those of one that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron.training.checkpoint import find_checkpoint  # noqa: E402 - also started as a script
from megatron.training.control import Control  # noqa: E402
from tests.training.runs import FLAGS, losses  # noqa: E402

RANKS = 2
ITERATIONS = 30
LIFE_SECONDS = 180
SECONDS_ALONE = 10
"""How long the rank that is left may take to find out that the other is gone."""


class SoakError(AssertionError):
    """A run did not come back as it was."""


def main() -> int:
    """Kill and compare; returns 0 when every loss was the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-kills", type=int, default=10, help="kills in the middle of a step (default: 10)")
    parser.add_argument("--save-kills", type=int, default=10, help="kills in the middle of a save (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-soak-") as folder:
        soak(Path(folder), ["step"] * arguments.step_kills + ["save"] * arguments.save_kills, arguments.seed)
    return 0


def soak(folder: Path, kills: list[str], seed: int) -> None:
    """Make the kills, in random order, on as many runs as it takes.

    Raises:
        SoakError: a loss differs, or a run cannot be resumed.
    """
    chance = random.Random(seed)
    chance.shuffle(kills)
    with ranks(folder / "whole") as processes:
        wait_for_end(processes)
    expected = losses(folder / "whole")
    todo, runs = list(kills), 0
    while todo or not runs:
        runs += 1
        todo = todo[live(folder / f"run_{runs}", todo, chance) :]
        if losses(folder / f"run_{runs}") != expected:
            raise SoakError(f"run {runs}: the losses are not those of the run that nobody killed")
        shutil.rmtree(folder / f"run_{runs}")
    print(f"{len(kills)} kills of {runs} runs: all {len(expected)} losses of each run equal, bit for bit")


def live(save: Path, todo: list[str], chance: random.Random) -> int:
    """Run to the end, killed on the way as often as it takes or is to be; returns the number of kills."""
    kills = 0
    while True:
        with ranks(save) as processes:
            if kills == len(todo) or not kill(processes, save, todo[kills], chance):
                wait_for_end(processes)
                return kills
        kills += 1
        found = find_checkpoint(save, Control.alone(), warn=lambda text: print(f"  note: {text}"))
        print(f"  killed in a {todo[kills - 1]} after iteration {last_iteration(save)}; resumes {found}", flush=True)


def kill(processes: list[subprocess.Popen[bytes]], save: Path, moment: str, chance: random.Random) -> bool:
    """Kill one rank at the moment, then what is left of the other; False when the run ended before."""
    start, steps = last_iteration(save), chance.randint(1, 8)
    deadline = time.monotonic() + LIFE_SECONDS
    while not (last_iteration(save) >= start + steps and (moment == "step" or any(save.glob(".step_*.staging")))):
        if all(process.poll() is not None for process in processes):
            return False
        if time.monotonic() > deadline:
            raise SoakError("a run makes no steps")
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.05))
    if any(process.poll() is not None for process in processes):
        return False
    first = chance.randrange(RANKS)
    processes[first].kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[1 - first].wait(chance.choice([0, SECONDS_ALONE]))
    return True


def last_iteration(save: Path) -> int:
    """Find the last iteration that the run reported."""
    return max(losses(save), default=0) if (save / "metrics.jsonl").exists() else 0


def wait_for_end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the ranks have ended well."""
    codes = [process.wait(LIFE_SECONDS) for process in processes]
    if any(codes):
        raise SoakError(f"the ranks ended with {codes}")


@contextlib.contextmanager
def ranks(save: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the ranks of a run, or resume it; at the end of the block none of them is left."""
    save.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", str(ITERATIONS), "--save-interval", "2"]
    flags += ["--save", str(save), "--load", str(save), "--load-if-exists", "--keep-last", "2"]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    variables |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(save / "extensions")}
    with (save / "log").open("ab") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "pretrain_gpt.py"), *flags],
                env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(RANKS)
        ]
    try:
        yield processes
    except SoakError:
        print((save / "log").read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    """Find a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
