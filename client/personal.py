"""What a site keeps to itself from round to round: its own normalization layers, a file a round in its work folder.

The values after a round belong to the update that was trained with them: they are kept if the coordinator took it, and
dropped if not. One file, written once, goes through three names:

    000007.awaited   round 7 is trained; the update is not whole at the coordinator
    000007.sent      its last bytes go out; from here on the coordinator may hold it
    000007.tensors   the receipt came, and accepted it

The update itself lies in the site's outbox meanwhile (`client.outbox`), which also says to which values it belongs. A
site that is killed or cut off offers it again: with its round's task, as if nothing had happened; with any later one,
or at the study's end, to hear whether it was taken, and keep or drop the values by that.

A name changes in one step, so a site that is killed finds one of them. Where the update is not in the outbox any more,
the next task says how it ended:

    no file     the round is asked for again and trained to the same bits, or it went on without this site
    awaited     the coordinator cannot hold the update: dropped
    sent        round 7 is asked for again: the coordinator does not hold it, dropped and trained anew. Anything later
                is asked for: the coordinator no longer waits for it, so it counts as taken
    tensors     the values to go on from. Round 7 asked for again: the coordinator has gone back, dropped

So what is left open is a site that is cut off between the last bytes and the receipt, of an update that was refused,
and whose outbox is lost too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from client.room import MakeRoom, no_room, with_room
from client.work import OnBatch, Worker
from common.errors import DataError, RunFolderError, WireError
from common.learning.personal import Own, PersonalLayers
from common.wire.tensors import PARTIAL_SUFFIX, Array, TensorSpec, read_tensors, write_tensors

_AWAITED, _SENT, _KEPT = ".awaited", ".sent", ".tensors"
_KEEP = 4  # A coordinator keeps two states to go back to; a round is then asked for again.


class PersonalStore:
    """A site's own values of one run by round. A round that is done again starts from the same ones.

    All methods raise RunFolderError where the folder cannot be read or written.

    Parameters
    ----------
    folder : of this study, plan and run alone; made when something is written.
    specs : the types of the values.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec]) -> None:
        self._folder = folder
        self._specs = specs

    def after(self, round_number: int) -> Own | None:
        """The values after the newest round up to `round_number` whose update was taken; None if there is none.

        Raises
        ------
        DataError : the file is damaged.
        """
        number = max((number for number in self._rounds(_KEPT) if number <= round_number), default=None)
        if number is None:
            return None
        path = self._path(number, _KEPT)
        try:
            return read_tensors(path, self._specs)
        except WireError as error:
            raise DataError(
                f"{path}: this site's own normalization cannot be used ({error}); remove the file to go on from the "
                "round before, or from the study's beginning"
            ) from error

    def asked(self, round_number: int, *, trains: bool) -> None:
        """A task has come, to train in this round or to evaluate after it: settles what was left open before it."""
        done = round_number - trains  # every round up to this one is over for this site
        with self._told("written"):
            for number in self._rounds(_SENT):
                if number <= done:
                    self._rename(number, _SENT, _KEPT)
            self._remove(_AWAITED, _SENT)
            self._remove(_KEPT, of=lambda number: number > done)  # of a run that was cut off, or of one before this
            for path in self._folder.glob(f".*{PARTIAL_SUFFIX}"):
                path.unlink(missing_ok=True)

    def hold(self, round_number: int, own: Own) -> None:
        """Writes the values after a round whose update is about to be sent."""
        with self._told("written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(round_number, _AWAITED), own)

    def held(self, round_number: int) -> bytes:
        """SHA-256 of the values of an update that has no answer yet; b"" where there are none."""
        with self._told("read"):
            for suffix in (_AWAITED, _SENT):
                if self._path(round_number, suffix).exists():
                    return hashlib.sha256(self._path(round_number, suffix).read_bytes()).digest()
        return b""

    def sending(self, round_number: int) -> None:
        """The coordinator asks for bytes of the update, perhaps once more."""
        with self._told("written"):
            self._rename(round_number, _SENT, _AWAITED)

    def sent(self, round_number: int) -> None:
        """The update's last bytes are about to go out."""
        with self._told("written"):
            self._rename(round_number, _AWAITED, _SENT)

    def answered(self, round_number: int, accepted: bool) -> None:
        """The receipt is here: the values are kept, and those of old rounds go; or they are dropped."""
        with self._told("written"):
            if accepted:
                self._rename(round_number, _AWAITED, _SENT)
                self._rename(round_number, _SENT, _KEPT)
                self._remove(_KEPT, of=lambda number: number <= round_number - _KEEP)
            self._remove(_AWAITED, _SENT)

    def _rounds(self, suffix: str) -> list[int]:
        with self._told("read"):
            if not self._folder.exists():
                return []
            found = [path for path in self._folder.iterdir() if path.suffix == suffix and path.stem.isdigit()]
            return sorted(int(path.stem) for path in found)

    def _remove(self, *suffixes: str, of: Callable[[int], bool] = lambda number: True) -> None:
        for suffix in suffixes:
            for number in filter(of, self._rounds(suffix)):
                self._path(number, suffix).unlink(missing_ok=True)

    def _rename(self, number: int, before: str, after: str) -> None:
        """Durable when it returns; nothing happens where there is no such file."""
        if not self._path(number, before).exists():
            return
        self._path(number, before).replace(self._path(number, after))
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"{self._folder}: this site's own normalization cannot be {what} ({error.strerror or error}); check "
                "the folder's rights and the disk's space, or give another --work"
            ) from error

    def _path(self, round_number: int, suffix: str) -> Path:
        return self._folder / f"{round_number:06d}{suffix}"


class PersonalWorker:
    """A worker whose normalization layers are the site's own (see `common.learning.personal`); a `Keeper`.

    Parameters
    ----------
    worker : does the work.
    layers : where the site's own values are in what it gets and gives.
    folder : where they are kept: of this study, plan and run alone.
    make_room : called where the disk is too full for them after a round, and they are then written once more.
    """

    def __init__(self, worker: Worker, layers: PersonalLayers, folder: Path, make_room: MakeRoom = no_room) -> None:
        self._worker = worker
        self._make_room = make_room
        self._layers = layers
        self._folder = folder
        self._store = PersonalStore(folder, layers.specs)
        self.digest = worker.digest
        self.training_cases = worker.training_cases
        self.validation_cases = worker.validation_cases

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        """See `Worker`."""
        return self._worker.expected(kind)

    def cases(self, kind: str) -> int:
        """See `Worker`."""
        return self._worker.cases(kind)

    def work(self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: OnBatch) -> Sequence[Array]:
        """See `Worker`."""
        trains = kind == "train"
        # Training begins from before the round, even if the round was trained before; evaluation follows it.
        self._store.asked(round_number, trains=trains)
        own = self._store.after(round_number - trains) or self._layers.taken(broadcast)
        cut_short = False

        def watched(batch: int, batches: int) -> None:
            nonlocal cut_short
            try:
                on_batch(batch, batches)
            except BaseException:
                cut_short = True
                raise

        sent = self._worker.work(kind, round_number, self._layers.spliced(broadcast, own), watched)
        if not trains:
            return sent
        sent, own = self._layers.kept(sent, own)
        if not cut_short:
            with_room(lambda: self._store.hold(round_number, own), self._make_room)
        return sent

    def of_run(self, run: bytes) -> PersonalWorker:
        """See `Keeper`."""
        return PersonalWorker(self._worker, self._layers, self._folder / run.hex()[:16], self._make_room)

    def held(self, round_number: int) -> bytes:
        """See `Keeper`."""
        return self._store.held(round_number)

    def sending(self, round_number: int) -> None:
        """See `Keeper`."""
        self._store.sending(round_number)

    def sent(self, round_number: int) -> None:
        """See `Keeper`."""
        self._store.sent(round_number)

    def answered(self, round_number: int, accepted: bool) -> None:
        """See `Keeper`."""
        self._store.answered(round_number, accepted)
