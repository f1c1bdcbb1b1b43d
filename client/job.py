"""The work on one task, in a thread of its own: a line that breaks does not end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from client.datasets import Cancelled
from client.outbox import Outbox, PendingUpdate, TaskKey
from client.site_log import of_this_site
from client.work import Keeper, Worker
from common.errors import RunFolderError
from common.failpoints import hit
from common.wire import federation_pb2 as pb
from common.wire.tensors import Array

THREAD = "wardround-work"
"""Name of the threads that work."""


class Job:
    """Computes the update that a task asks for and leaves it in the outbox.

    Parameters
    ----------
    task, key : what is asked; `task` may be replaced by a later one of the same key.
    worker, outbox : who does it, and where it is held.
    broadcast : what it begins from.
    download : the seconds that its download took.
    on_batch : called in the job's thread as each batch begins.
    done : called in the job's thread when all is over.

    Attributes
    ----------
    ended : set when the thread does nothing more.
    pending : the update; None if the work was cancelled or failed.
    error : what it failed with.
    """

    def __init__(
        self,
        task: pb.Task,
        key: TaskKey,
        worker: Worker,
        outbox: Outbox,
        broadcast: Sequence[Array],
        download: float,
        *,
        on_batch: Callable[[Job, int, int], None],
        done: Callable[[Job], None],
    ) -> None:
        self.task = task
        self.key = key
        self.batch, self.batches = 0, 0
        self.ended = threading.Event()
        self.pending: PendingUpdate | None = None
        self.error: BaseException | None = None
        self._worker = worker
        self._outbox = outbox
        self._broadcast: Sequence[Array] = broadcast
        self._download = download
        self._on_batch = on_batch
        self._done = done
        self._cancelled = threading.Event()
        threading.Thread(target=of_this_site(self._run), daemon=True, name=THREAD).start()

    def cancel(self) -> None:
        """Ends the work at its next batch; wait for `ended` then."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def _run(self) -> None:
        try:
            self._work()
        except Cancelled:
            pass
        except BaseException as error:  # it is raised where the agent runs
            self.error = error
        self._broadcast = ()
        self.ended.set()
        self._done(self)

    def _work(self) -> None:
        kind, number = self.key.kind, self.key.number

        def on_batch(batch: int, batches: int) -> None:
            if self.cancelled:
                raise Cancelled
            _batch_failpoint()
            self.batch, self.batches = batch, batches
            self._on_batch(self, batch, batches)

        started = time.monotonic()
        update = self._worker.work(kind, number, self._broadcast, on_batch)
        seconds = time.monotonic() - started
        if self.cancelled:  # data sets end early, and what they return is of a part
            raise Cancelled
        kept = self._worker.held(number) if kind == "train" and isinstance(self._worker, Keeper) else b""
        cases = self._worker.cases(kind)
        self.pending = self._outbox.hold(
            self.key, update, cases=cases, download=self._download, work=seconds, kept=kept
        )


def _batch_failpoint() -> None:
    try:
        hit("site.batch")
    except OSError as error:
        raise RunFolderError(f"the work folder cannot be used ({error})") from error
