"""What a site keeps to itself from round to round: its own normalization layers, a file a round in its work folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from client.work import OnBatch, Worker
from common.errors import DataError, RunFolderError, WireError
from common.learning.personal import Own, PersonalLayers
from common.wire.tensors import Array, TensorSpec, read_tensors, write_tensors

_SUFFIX = ".tensors"
_KEEP = 4  # A coordinator keeps two states to go back to; a round is then asked for again.


class PersonalStore:
    """A site's own values of one study by round. A round that is done again starts from the same ones.

    Parameters
    ----------
    folder : of this study and plan alone; made when something is saved.
    specs : the types of the values.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec]) -> None:
        self._folder = folder
        self._specs = specs

    def after(self, round_number: int) -> Own | None:
        """The values after the newest round up to `round_number` that the site trained in; None if there is none.

        Raises
        ------
        DataError : the file is damaged.
        RunFolderError : the folder cannot be read.
        """
        number = max((number for number in self._rounds() if number <= round_number), default=None)
        if number is None:
            return None
        try:
            return read_tensors(self._path(number), self._specs)
        except WireError as error:
            raise DataError(
                f"{self._path(number)}: this site's own normalization cannot be used ({error}); remove the file to go "
                "on from the round before, or from the study's beginning"
            ) from error

    def save(self, round_number: int, own: Own) -> None:
        """Keeps the values after a round; later ones, of a run that was cut off, and old ones go.

        Raises
        ------
        RunFolderError : the folder cannot be written.
        """
        with self._told("written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(round_number), own)
            for number in self._rounds():
                if not round_number - _KEEP < number <= round_number:
                    self._path(number).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        with self._told("read"):
            if not self._folder.exists():
                return []
            return [int(path.stem) for path in self._folder.iterdir() if path.suffix == _SUFFIX and path.stem.isdigit()]

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"{self._folder}: this site's own normalization cannot be {what} ({error.strerror or error}); check "
                "the folder's rights and the disk's space, or give another --work"
            ) from error

    def _path(self, round_number: int) -> Path:
        return self._folder / f"{round_number:06d}{_SUFFIX}"


class PersonalWorker:
    """A worker whose normalization layers are the site's own (see `common.learning.personal`).

    Parameters
    ----------
    worker : does the work.
    layers : where the site's own values are in what it gets and gives.
    store : keeps them.
    """

    def __init__(self, worker: Worker, layers: PersonalLayers, store: PersonalStore) -> None:
        self._worker = worker
        self._layers = layers
        self._store = store
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
            self._store.save(round_number, own)
        return sent
