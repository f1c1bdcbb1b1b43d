"""What privacy a site has spent, on its own disk: durable before anything that spends it leaves, and never forgotten.

Two things lie in the work folder under `privacy/`::

    ledger.jsonl                   a line for each private round of any study, appended and never changed
    <study>-<plan>-<run>/7.secret  32 random bytes of round 7, readable by nobody else

The noise of a round follows from its secret, the weights it began from and the data it was trained on. So a site that
is killed and does the round again sends the same bits, which tell nobody anything new and count once; and where
anything differs, as when a coordinator has gone back, the noise does too, and the round counts again. Were the noise
the same then, the difference of the two updates would be free of it.

A secret goes when its round can no longer be asked for again to the same bits: when the round after the next begins,
as the coordinator has saved it by then, or when the study is over (`common.privacy.secrets`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.disk import sync_folder
from common.errors import RunFolderError
from common.privacy.accounting import NoisySteps
from common.wire.partial import disk_hit


@dataclass(frozen=True)
class Entry:
    """A private round that may have left.

    Attributes
    ----------
    study, run, round : of which it is; `run` as hexadecimal digits.
    draw : tells draws of randomness apart; the same one counts once.
    patients : how many the site had.
    rate, noise_multiplier, steps : see `NoisySteps`.
    at : when, Unix time.
    """

    study: str
    run: str
    round: int
    draw: str
    patients: int
    rate: float
    noise_multiplier: float
    steps: int
    at: float

    @property
    def spent(self) -> NoisySteps:
        """What the accountant is told."""
        return NoisySteps(self.rate, self.noise_multiplier, self.steps)


class Ledger:
    """All private rounds of the studies of one work folder; used by one process at a time.

    Parameters
    ----------
    folder : `privacy` of the work folder; made when something is written.

    Raises
    ------
    RunFolderError : from every method: the ledger cannot be read or written, or is damaged. Nothing is trained then.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger.jsonl"
        self._entries: list[Entry] | None = None

    def entries(self, study: str | None = None) -> list[Entry]:
        """What was spent, oldest first, of one study or of all."""
        if self._entries is None:
            self._entries = self._load()
        return [entry for entry in self._entries if study in (None, entry.study)]

    def has(self, draw: str) -> bool:
        """Whether this draw is counted already."""
        return any(entry.draw == draw for entry in self.entries())

    def append(self, entry: Entry) -> None:
        """Counts a round; durable when it returns."""
        entries = self.entries()
        with _told(self._path, "written"):
            disk_hit("privacy.before", self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
                file.write(json.dumps(asdict(entry)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self._path.parent)
        entries.append(entry)
        self._entries = entries
        disk_hit("privacy.counted", self._path)

    def _load(self) -> list[Entry]:
        with _told(self._path, "read"):
            if not self._path.exists():
                return []
            text = self._path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):  # killed while it was written: its round had not left
                os.truncate(self._path, len(whole))
        try:
            return [_parsed(line) for line in whole.splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{self._path}: the ledger of the privacy spent is damaged ({error}); put it back from a backup. This "
                "site does no private training without it, as it could spend more than was allowed"
            ) from error


def now() -> float:
    """The time that entries carry."""
    return round(time.time(), 3)


def _parsed(line: bytes) -> Entry:
    fields = json.loads(line)
    entry = Entry(**fields)
    if not (0 < float(entry.rate) <= 1 and float(entry.noise_multiplier) > 0 and int(entry.steps) > 0 and entry.draw):
        raise ValueError(f"an impossible entry of round {entry.round}")
    return entry


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be {what} ({error.strerror or error}); check the folder's rights and the disk's space"
        ) from error
