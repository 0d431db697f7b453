"""Processes that are there at once: forked from one that has imported torch, DeepSpeed and the package already.

    with Zygote(folder) as zygote:
        process = zygote.start("tests.faults.toy_run:train", [1, 2], variables={"RANK": "1"}, log=folder / "log")
        process.kill()

A process starts in a hundredth of a second instead of ten, which is what makes hundreds of kills affordable.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOK_SECONDS = 0.002


class Forked:
    """A process that the zygote started; it is the zygote's child, which says how it ended."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask(poll=self.pid)
        return self._code

    def wait(self, seconds: float) -> int | None:
        """Wait so long for its exit code; None when it still runs."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return self._code

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(30)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Zygote:
    """The process that has imported everything. In a `with` block; at its end none of its children is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Zygote:
        variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        variables |= {"TORCH_EXTENSIONS_DIR": str(self._folder / "extensions"), "PYTHONPATH": str(ROOT)}
        with (self._folder / "zygote.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote"],
                cwd=ROOT,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._lock = threading.Lock()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()  # it ends its children and itself
        self._process.wait(30)

    def start(self, function: str, args: list[object], variables: dict[str, str], log: Path) -> Forked:
        """Call `module:function` with JSON arguments in a new process; what it returns is its exit code."""
        request = {"function": function, "args": args, "variables": variables, "log": str(log)}
        return Forked(self, self.ask(start=request))

    def ask(self, **request):
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError((self._folder / "zygote.log").read_text(errors="replace")[-4000:])
        return json.loads(answer)


def serve() -> None:
    """Fork what is asked for until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for module in ("deepspeed", "megatron.engine.flat", "megatron.training.build", "tests.faults.toy_run"):
        importlib.import_module(module)
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                answers.close()
                live(**request["start"])
            children[answer] = None
        else:
            answer = children[request["poll"]]
            if answer is None:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = children[request["poll"]] = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)
    for pid in [pid for pid, code in children.items() if code is None]:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # at once: no exit handler of a library is under test


def live(function: str, args: list[object], variables: dict[str, str], log: str) -> None:
    """Be the new process."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(variables)
        module, name = function.split(":")
        code = getattr(importlib.import_module(module), name)(*args) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
