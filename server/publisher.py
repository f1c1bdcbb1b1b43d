"""Publishes rounds of a run while its coordinator does something else: in a process of its own, one at a time.

A process of its own, because converting and measuring take TensorFlow's threads and hundreds of megabytes, which the
rounds have for themselves, and because a coordinator that only serves what is published loads no TensorFlow at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from common.errors import PublishError, RunFolderError
from server.run_folder import RunFolder

# -P: a folder named `server` where the coordinator was started is not to be mistaken for the package.
_COMMAND: Final = (sys.executable, "-P", "-m", "server.cli", "publish")
_MOST_LETTERS: Final = 1000


class NewVersion(NamedTuple):
    """A version that was published, and the round whose weights it has."""

    version: str
    round: int


class Publisher:
    """Publishes by `wardround publish`.

    Parameters
    ----------
    run : whose rounds.
    identity : folder of the coordinator's, which signs.
    holdout, old_holdout : labelled images, as the coordinator was started with.
    command : what is started; arguments are added to it.

    Attributes
    ----------
    held : the round that is being published, if one is: its weights have to stay until that is done.
    """

    def __init__(
        self,
        run: RunFolder,
        identity: Path,
        holdout: Path | None = None,
        old_holdout: Path | None = None,
        *,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        places = ["--run", run.path, "--identity", identity]
        places += ["--without-holdout"] if holdout is None else ["--holdout", holdout]
        places += [] if old_holdout is None else ["--old-holdout", old_holdout]
        self._command = [*command, "--json", *map(str, places)]
        self._run = run
        self._lock = asyncio.Lock()
        self.held: tuple[int, ...] = ()
        self._process: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncGenerator[None, None]:
        """Nobody publishes meanwhile; waits until who does has ended."""
        async with self._lock:
            yield

    async def publish(self, round_number: int | None, *, explain: bool) -> NewVersion:
        """Publishes a round whose weights were kept; None: the best.

        Raises
        ------
        PublishError : it could not be published, in the words of the command; or another round is being published.
        """
        if self._lock.locked():
            raise PublishError("a version is being published already; ask again when it is done")
        async with self._lock:
            chosen = round_number or await asyncio.to_thread(self._best)
            self.held = () if chosen is None else (chosen,)
            arguments = [] if chosen is None else ["--round", str(chosen)]
            arguments += ["--explain"] if explain else []
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                output, errors = await self._process.communicate()
            finally:
                self.held = ()
                self.stop()
            if self._process.returncode != 0:
                raise PublishError(_said(errors.decode(errors="replace")))
            report = json.loads(output)
            return NewVersion(str(report["publication"]["version"]), int(report["best_round"]))

    def _best(self) -> int | None:
        """The best round so far; None where the status knows of none, and the command chooses."""
        with contextlib.suppress(RunFolderError):
            if best := self._run.read_status().get("best"):
                return int(best["round"])
        return None

    def stop(self) -> None:
        """Ends a publication under way, of which nothing stays."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()


def _said(errors: str) -> str:
    """What the command gave as the reason."""
    said = [line.partition("error: ")[2] for line in errors.splitlines() if "error: " in line]
    return (said[-1] if said else "the process that publishes ended without a word")[:_MOST_LETTERS]
