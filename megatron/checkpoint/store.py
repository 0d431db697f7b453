"""Saves the checkpoints of a run, while it waits or while it trains on; every rank has a store, and all save together.

begin     all ranks, between two steps: is there room, a new staging folder; with `--async-save` the tensors are
copied to the host, and a thread does the rest
write     each rank: its files, hashed while they are written, then its record
commit    the first rank, when all records are there: `megatron.checkpoint.commit`, then retention
settle    all ranks, between two steps: the first one's verdict, the same for all
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.commit import Content, commit, open_root, open_staging
from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.fragments import Fragment, write_fragments
from megatron.checkpoint.host_copies import HostCopies
from megatron.checkpoint.names import iteration_of, rng_file, tag_of
from megatron.checkpoint.ranks import Ranks
from megatron.checkpoint.records import Heartbeat, Part, wait_for_records, write_record
from megatron.checkpoint.retention import clear_leftovers, remove, retain, steps_in
from megatron.checkpoint.space import Need, check_disk, check_memory, free_space, need_of
from megatron.checkpoint.streams import write_streams

CLOSING_SECONDS = 20.0
"""How long a run that ends with an error lets a save that is under way go on."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a rank has to save at the end of a step.

    Attributes:
        iteration: steps done; names the checkpoint.
        fragments: the tensors that this rank owns.
        state: counters, layout and the engine's state, JSON; the first rank's is written.
        streams: this rank's random streams; None leaves them out.
    """

    iteration: int
    fragments: Sequence[Fragment]
    state: Mapping[str, Any]
    streams: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        path: its folder.
        iteration: that it is of.
        num_bytes: of the files of all ranks.
        seconds: from the beginning of the save until it was complete.
        stalled: seconds of it in which the training waited.
    """

    path: Path
    iteration: int
    num_bytes: int
    seconds: float
    stalled: float


class _Save:
    """A save that is under way on this rank."""

    def __init__(self, staging: Path, tag: str, snapshot: Snapshot, started: float) -> None:
        self.staging = staging
        self.tag = tag
        self.snapshot = snapshot
        self.started = started
        self.stalled = 0.0
        self.problem: str | None = None
        """Why this rank could not write its part."""
        self.verdict: tuple[Saved | None, str | None] = None, "it did not end"
        """What the first rank says of the whole save."""
        self.thread: threading.Thread | None = None


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        root: the folder of `--save`.
        config: the sections of the run, JSON.
        ranks: that save together.
        keep_last: complete checkpoints to keep; 0 keeps all.
        keep_every: those at multiples of this many steps stay for ever; 0 is none.
        background: write while the training goes on, from copies on the host.
        time_limit: seconds that a rank waits for the others to write.
    """

    def __init__(
        self,
        root: Path,
        *,
        config: Mapping[str, Any],
        ranks: Ranks,
        keep_last: int = 0,
        keep_every: int = 0,
        background: bool = False,
        time_limit: float = 3600.0,
    ) -> None:
        self._root = root
        self._config = config
        self._ranks = ranks
        self._retain = {"keep_last": keep_last, "keep_every": keep_every}
        self._background = background
        self._time_limit = time_limit
        self._copies = HostCopies()
        self._under_way: _Save | None = None
        self._hurried = threading.Event()

    def tidy(self, resumed: Path) -> None:
        """Do what a run that was killed right after its last commit has left undone.

        Args:
            resumed: the checkpoint that this run resumes, found whole. Where it is the newest of this folder, what is
                beyond the limits goes, as it would have; a run that is taken back to an older one removes nothing yet.
        """
        iteration = iteration_of(resumed.name)
        if not self._ranks.is_first or iteration is None or resumed.resolve().parent != self._root.resolve():
            return
        clear_leftovers(self._root)
        if iteration == max(steps_in(self._root)):
            retain(self._root, iteration, **self._retain)

    def save(self, snapshot: Snapshot) -> list[Saved]:
        """Save a checkpoint, or begin to; returns those that are complete now.

        In the background the one before is waited for, so that there is never more than one under way.

        Raises:
            CheckpointError: on every rank: it, or the one before, cannot be written; the last one is as it was.
        """
        started = time.monotonic()
        done = self.finish()
        save = self._begin(snapshot, started)
        if self._background:
            save.thread = threading.Thread(target=self._work, args=(save,), name=f"save {save.tag}", daemon=True)
            save.thread.start()
            save.stalled = time.monotonic() - started
            return done
        self._attempt(save)
        problems = dict(enumerate(self._ranks.gather(save.problem)))
        if self._ranks.is_first:
            self._conclude(save, problems)
        return [*done, self._settle(save)]

    def poll(self) -> list[Saved]:
        """Return the checkpoint that became complete since the last step, if one did. Every rank calls it.

        Raises:
            CheckpointError: on every rank: it could not be written.
        """
        save = self._under_way
        if save is None:
            return []
        ended = self._ranks.is_first and save.thread is not None and not save.thread.is_alive()
        return [self._settle(save)] if self._ranks.largest(int(ended)) else []

    def finish(self) -> list[Saved]:
        """Wait for the save that is under way, if there is one. Every rank calls it.

        Raises:
            CheckpointError: on every rank: it could not be written.
        """
        return [] if self._under_way is None else [self._settle(self._under_way)]

    def close(self) -> None:
        """Let a save that is under way go on for some seconds, when the run ends without having waited for it."""
        if self._under_way is not None and self._under_way.thread is not None:
            self._hurried.set()
            self._under_way.thread.join(CLOSING_SECONDS)

    def _begin(self, snapshot: Snapshot, started: float) -> _Save:
        """Agree that there is room, and on a folder; take copies."""
        fragments = snapshot.fragments
        copied = self._copies.missing_bytes(fragments) if self._background else 0
        num_bytes = sum(fragment.tensor.numel() * fragment.tensor.element_size() for fragment in fragments)
        needs: list[Need] = self._ranks.gather(need_of(num_bytes, len(fragments), copied))
        check_memory(needs)
        tag = tag_of(snapshot.iteration)
        staging, problem = self._ranks.of_first(self._open(tag, needs) if self._ranks.is_first else None)
        if problem is not None:
            raise CheckpointError(problem)
        if self._background:
            fragments = self._copies.take(fragments)
            snapshot = replace(snapshot, fragments=fragments, state=copy.deepcopy(dict(snapshot.state)))
        save = _Save(Path(staging), tag, snapshot, started)
        self._under_way = save
        return save

    def _open(self, tag: str, needs: Sequence[Need]) -> tuple[str, str | None]:
        try:
            open_root(self._root)
            check_disk(self._root, needs)
            return str(open_staging(self._root, tag)), None
        except (CheckpointError, OSError) as error:
            return "", self._explain(tag, error)

    def _work(self, save: _Save) -> None:
        """Do what is left of a save in the background, without asking any rank."""
        with Heartbeat(save.staging, self._ranks.rank):
            self._attempt(save)
        if self._ranks.is_first:
            self._conclude(save, {self._ranks.rank: save.problem})

    def _write(self, save: _Save) -> None:
        """Write this rank's files, then its record."""
        rank, snapshot = self._ranks.rank, save.snapshot
        tensors, files = write_fragments(save.staging, rank, snapshot.fragments)
        if snapshot.streams is not None:
            files = {**files, rng_file(rank): write_streams(save.staging / rng_file(rank), snapshot.streams)}
        write_record(save.staging, rank, Part(files, tensors))

    def _attempt(self, save: _Save) -> None:
        """Write, or leave the sentence that says why not in the place of the files."""
        try:
            self._write(save)
        except Exception as error:  # the other ranks must hear of it, whatever it is
            save.problem = self._explain(save.tag, error)
            rank = self._ranks.rank
            with contextlib.suppress(OSError):
                for path in [*save.staging.glob(f"tensors_{rank:05d}_*"), save.staging / rng_file(rank)]:
                    path.unlink(missing_ok=True)  # on a full disk they would leave no room for the sentence
                write_record(save.staging, rank, None, save.problem)

    def _conclude(self, save: _Save, problems: Mapping[int, str | None]) -> None:
        """On the first rank: make the checkpoint of what all have written, or clear it away.

        Args:
            save: whose records are waited for.
            problems: what is known of ranks without asking their records.
        """
        failed = {rank: problem for rank, problem in problems.items() if problem is not None}
        try:
            writing = [rank for rank in range(self._ranks.size) if rank not in failed]
            parts = wait_for_records(save.staging, writing, self._time_limit, self._hurried)
            if failed:
                raise CheckpointError("; ".join(failed.values()))
            files = {name: digest for part in parts for name, digest in part.files.items()}
            tensors = [record for part in parts for record in part.tensors]
            content = Content(files=files, tensors=tensors, state=save.snapshot.state, config=self._config)
            path = commit(self._root, save.staging, save.tag, content)
            retain(self._root, save.snapshot.iteration, **self._retain)
        except Exception as error:
            remove(save.staging)
            save.verdict = None, self._explain(save.tag, error)
        else:
            num_bytes = sum(digest.bytes for digest in files.values())
            seconds = time.monotonic() - save.started
            iteration = save.snapshot.iteration
            save.verdict = Saved(path=path, iteration=iteration, num_bytes=num_bytes, seconds=seconds, stalled=0), None

    def _settle(self, save: _Save) -> Saved:
        """Wait for this rank's thread, and share the verdict of the first."""
        started = time.monotonic()
        if save.thread is not None:
            save.thread.join()
        saved, problem = self._ranks.of_first(save.verdict if self._ranks.is_first else None)
        self._under_way = None
        if problem is not None:
            problems = [problem, *filter(None, self._ranks.gather(save.problem))]
            raise CheckpointError("; ".join(dict.fromkeys(problems)))
        waited = time.monotonic() - started if save.thread is not None else saved.seconds
        return replace(saved, stalled=save.stalled + waited)

    def _explain(self, tag: str, error: Exception) -> str:
        """Make a sentence of an error; torch tells of a full disk by a RuntimeError about positions."""
        if isinstance(error, CheckpointError):
            return str(error)
        text = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"rank {self._ranks.rank} cannot write the checkpoint {self._root / tag} ({free_space(self._root)}): "
            f"{text}; make room there or give --save another folder, and resume from the last checkpoint, which is as "
            "it was"
        )
