"""Kill -9 runs of two ranks at random moments and at named points, resume each, and compare every loss bit for bit.

    python tests/faults/chaos.py --kills 200

Two fifths of the kills hit the real training, the others a toy that trains a few numbers with the real store on real
ranks; half of the runs save in the background. A run is killed until it has come to its end, then the next one starts;
where one rank dies, the other is left to find out, for a while. After each kill there must be a whole checkpoint,
never older than one that was whole before; at the end the losses must be those of a run that nobody killed, and the
folder must hold what the limits say and nothing else.
"""

from __future__ import annotations

import argparse
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # also started as a script

from megatron.checkpoint.find import find_checkpoint  # noqa: E402
from megatron.checkpoint.names import iteration_of, tag_of  # noqa: E402
from megatron.training.control import Control  # noqa: E402
from tests.faults import toy_run  # noqa: E402
from tests.faults.points import FIRST_RANK_ONLY, IN_THE_BACKGROUND_ONLY, POINTS, STEPS  # noqa: E402
from tests.faults.zygote import Forked, Zygote  # noqa: E402
from tests.training import runs  # noqa: E402

RANKS = 2
LIFE_SECONDS = 240
SECONDS_ALONE = 5
"""How long the rank that is left may take to find out that the other is gone."""

RANDOM = "a random moment"
RANDOM_SAVE = "a random moment of a save"
INTERVAL = toy_run.INTERVAL
KEEP_LAST, KEEP_EVERY = toy_run.KEEP_LAST, toy_run.KEEP_EVERY


class ChaosError(AssertionError):
    """A run did not come back as it was."""


@dataclass(frozen=True)
class Kill:
    """One kill: where, and of which rank."""

    point: str
    rank: int
    calls: int = 1


@dataclass(frozen=True)
class Kind:
    """The runs of one kind: the toy or the real training, saving in the background or not."""

    real: bool
    background: bool

    def __str__(self) -> str:
        return f"{'training' if self.real else 'toy'}, {'in the background' if self.background else 'waiting'}"

    @property
    def iterations(self) -> int:
        return toy_run.ITERATIONS

    def losses(self, save: Path) -> dict[int, str]:
        if self.real:
            return runs.losses(save) if (save / "metrics.jsonl").exists() else {}
        return toy_run.losses(save)

    def start(self, zygote: Zygote, save: Path, fault: Kill | None) -> list[Forked]:
        """Start or resume the ranks; a fault that is no moment of the clock is planted in its rank."""
        save.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        planted = fault if fault is not None and fault.point in POINTS else None
        processes = []
        for rank in range(RANKS):
            arms = [planted.point, planted.calls] if planted is not None and planted.rank == rank else None
            function, args = "tests.faults.toy_run:pretrain", [self._flags(save), arms]
            if not self.real:
                meeting = str(save.parent / f"meeting_{port}_{save.name}")
                function = "tests.faults.toy_run:train"
                args = [str(save), rank, RANKS, meeting, self.background, arms]
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(zygote.start(function, args, variables, save.parent / f"{save.name}.log"))
        return processes

    def _flags(self, save: Path) -> list[str]:
        flags = [*runs.FLAGS, "--mock-data", "--vocab-size", "64", "--train-iters", str(self.iterations)]
        flags += ["--save", str(save), "--save-interval", str(INTERVAL), "--keep-last", str(KEEP_LAST)]
        flags += ["--keep-every", str(KEEP_EVERY), "--load", str(save), "--load-if-exists"]
        return [*flags, "--async-save"] if self.background else flags


KINDS = [Kind(real=real, background=background) for real in (False, True) for background in (False, True)]


def main() -> int:
    """Kill and compare; returns 0 when every loss was the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--verbose", action="store_true", help="tell of each kill")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Zygote(Path(folder)) as zygote:
        for kind in KINDS:
            number = arguments.kills * (2 if kind.real else 3) // 10
            kills = plan(kind, number, arguments.seed)
            chaos(zygote, Path(folder) / str(KINDS.index(kind)), kind, kills, arguments.seed, arguments.verbose)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


def plan(kind: Kind, number: int, seed: int) -> list[Kill]:
    """Choose kills: every named point at least once if there are enough, the rest at random moments."""
    chance = random.Random(f"{seed} {kind}")
    absent = set() if kind.background else set(IN_THE_BACKGROUND_ONLY)
    absent |= {"a step begins"} if kind.real else {"a step of training begins", "a step of training ends"}
    points = [point for point in POINTS if point not in absent]
    kills = [
        Kill(point, 0 if point in FIRST_RANK_ONLY else chance.randrange(RANKS), calls_of(point, chance))
        for point in points
    ]
    moments = max(number // 3, number - len(kills))
    chance.shuffle(kills)
    kills = kills[: number - moments]
    kills += [Kill(chance.choice([RANDOM, RANDOM_SAVE]), chance.randrange(RANKS)) for _ in range(moments)]
    chance.shuffle(kills)
    return kills


def calls_of(point: str, chance: random.Random) -> int:
    """At which call to kill: some steps on, or in the first or second save."""
    if point in STEPS:
        return chance.randint(2, 5)
    return chance.randint(2, 6) if point == "a file is half written" else chance.randint(1, 2)


def chaos(zygote: Zygote, folder: Path, kind: Kind, kills: Sequence[Kill], seed: int, verbose: bool = False) -> int:
    """Make the kills, in order, on as many runs as it takes; returns how many were made and survived.

    Raises:
        ChaosError: a loss differs, a run cannot be resumed, or something is left lying about.
    """
    chance = random.Random(seed)
    folder.mkdir()
    save = folder / "whole"
    wait_for_end(kind.start(zygote, save, None), save)
    expected = kind.losses(save)
    check_folder(save, kind)
    if len(expected) != kind.iterations:
        raise ChaosError(f"{kind}: {len(expected)} losses of {kind.iterations}")
    done, number, before = 0, 0, -1
    while done < len(kills):
        if done == before:
            raise ChaosError(f"{kind}: no run comes to the point {kills[done]}")
        number, before = number + 1, done
        save = folder / f"run_{number}"
        done = live(zygote, kind, save, kills, done, chance, verbose)
        if kind.losses(save) != expected:
            raise ChaosError(f"{kind}, run {number}: the losses are not those of the run that nobody killed")
        check_folder(save, kind)
        shutil.rmtree(save)
    print(
        f"{kind}: {done} kills of {number} runs, {done} resumed, all {len(expected)} losses of each run equal bit for "
        "bit, no checkpoint over the limit",
        flush=True,
    )
    return done


def live(
    zygote: Zygote, kind: Kind, save: Path, kills: Sequence[Kill], done: int, chance: random.Random, verbose: bool
) -> int:
    """Run to the end, killed on the way as often as it takes or is to be; returns the number of kills so far."""
    resumed = 0
    while True:
        fault = kills[done] if done < len(kills) else None
        processes = kind.start(zygote, save, fault)
        try:
            if fault is None or not strike(processes, kind, save, fault, chance):
                wait_for_end(processes, save)
                return done
        finally:
            for process in processes:
                process.kill()
        done += 1
        found = find_checkpoint(save, Control.alone(), warn=not_damaged)
        iteration = 0 if found is None else iteration_of(found.name)
        if iteration < resumed:
            raise ChaosError(f"{kind}, {fault}: iteration {iteration} is resumed, and {resumed} was whole before")
        resumed = iteration
        if verbose:
            print(f"  {kind}: killed rank {fault.rank}, {fault.point}; resumes {found and found.name}", flush=True)


def not_damaged(text: str) -> None:
    """A kill leaves no damage to be told of; only a pointer that is one checkpoint behind, or was never written."""
    if "though" not in text and "latest names no checkpoint ([Errno 2]" not in text:
        raise ChaosError(text)


def strike(processes: list[Forked], kind: Kind, save: Path, fault: Kill, chance: random.Random) -> bool:
    """Kill a rank, or wait until it falls, then what is left of the other; False when the run ended before."""
    deadline = time.monotonic() + LIFE_SECONDS
    start, steps = max(kind.losses(save), default=0), chance.randint(1, 5)
    victim, other = processes[fault.rank], processes[1 - fault.rank]
    while victim.poll() is None:
        if fault.point in (RANDOM, RANDOM_SAVE) and max(kind.losses(save), default=0) >= start + steps:
            saving = any(save.glob(".step_*.staging"))
            if fault.point == RANDOM or saving:
                time.sleep(chance.uniform(0, 0.02))
                victim.kill()
                break
        if other.poll() not in (None, 0) and victim.poll() is None:
            raise ChaosError(f"rank {1 - fault.rank} ended with {other.poll()}:\n{log_of(save)}")
        if time.monotonic() > deadline:
            raise ChaosError(f"the run makes no steps:\n{log_of(save)}")
        time.sleep(0.001)
    if victim.wait(LIFE_SECONDS) == 0:
        return False
    if victim.poll() != -9:
        raise ChaosError(f"rank {fault.rank} ended with {victim.poll()}:\n{log_of(save)}")
    other.wait(chance.choice([0, SECONDS_ALONE]))
    return True


def wait_for_end(processes: list[Forked], save: Path) -> None:
    """Wait until the ranks have ended well."""
    codes = [process.wait(LIFE_SECONDS) for process in processes]
    if any(code != 0 for code in codes):
        raise ChaosError(f"the ranks ended with {codes}:\n{log_of(save)}")


def log_of(save: Path) -> str:
    return (save.parent / f"{save.name}.log").read_text(errors="replace")[-6000:]


def check_folder(save: Path, kind: Kind) -> None:
    """Hold what is on the disk against the limits."""
    saves = range(INTERVAL, kind.iterations + 1, INTERVAL)
    kept = {tag_of(step) for step in saves if step % KEEP_EVERY == 0} | {tag_of(step) for step in saves[-KEEP_LAST:]}
    there = {path.name for path in save.iterdir() if path.is_dir() or path.name.startswith(".")}
    if there != kept:
        raise ChaosError(f"{kind}: {sorted(there)} instead of {sorted(kept)}")


def free_port() -> int:
    """Find a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
