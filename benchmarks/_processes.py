"""Processes that a benchmark starts: each is a role of one of its modules, and none outlives it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Processes:
    """The processes started so far; each writes what it says of itself to `<folder>/<name>.log`."""

    folder: Path
    _started: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, name: str, module: str, *arguments: object) -> subprocess.Popen[str]:
        """Starts `python -m benchmarks.<module> <arguments>`, with pipes for its standard input and output."""
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"benchmarks.{module}", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"},
                text=True,
            )
        self._started[name] = process
        return process

    def check(self) -> None:
        """Raises RuntimeError, with the end of its log, if a process has failed."""
        for name, process in self._started.items():
            if process.poll():
                log = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
                raise RuntimeError("\n".join([f"{name} ended with exit code {process.returncode}:", *log[-15:]]))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; raises RuntimeError if a process fails before."""
        while not condition():
            self.check()
            time.sleep(0.05)
        self.check()

    def stop(self) -> None:
        """Ends those that still run."""
        for process in self._started.values():
            if process.poll() is None:
                process.terminate()
        for process in self._started.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def line(self, process: subprocess.Popen[str]) -> str:
        """The next line that the process prints."""
        line = pipe(process.stdout).readline()
        if not line:
            process.wait(5)
            self.check()
            raise RuntimeError(f"{process.args!r}: ended without a word")
        return line.rstrip("\n")


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Writes a line to the process's standard input."""
    stream = pipe(process.stdin)
    stream.write(f"{line}\n")
    stream.flush()


def pipe(stream: IO[str] | None) -> IO[str]:
    """A pipe that was asked for."""
    assert stream is not None
    return stream


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Processes that end with the block."""
    started = Processes(folder)
    try:
        yield started
    finally:
        started.stop()
