"""Where a round's figures go beside the tables: TensorBoard's event files and sample pictures of the holdout.

Both are for watching. Scalars are written before the round's state is saved, in a thread; pictures afterwards, in a
thread of their own that no round waits for. TensorFlow is loaded where it writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunFolderError
from common.learning.runtime import release_memory
from server.results import Evaluated
from server.run_folder import RunFolder
from server.watching.samples import Sampler, Taken, pictures, write_samples

_log = logging.getLogger("wardround.coordinator")


class InThread:
    """A release manager whose writing would keep the event loop from the sites.

    Parameters
    ----------
    make : makes what writes, at the first release, as that may write too.
    folder : where, for the error.
    """

    def __init__(self, make: Callable[[], Any], folder: Path) -> None:
        self._make = make
        self._manager: Any = None
        self._folder = folder

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics. Raises RunFolderError where they cannot be written."""
        import tensorflow as tf

        def write() -> None:
            self._manager = self._manager or self._make()
            asyncio.run(self._manager.release(value, key))

        try:
            await asyncio.to_thread(write)
        except (OSError, tf.errors.OpError) as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            said = first.rpartition("; ")[2]  # TensorFlow's words end on those of the system
            raise RunFolderError(
                f"{self._folder}: cannot be written ({said}); free space, or make the "
                "disk writable, and start again with the same command: what was finished is kept"
            ) from error


class SamplePictures:
    """A release manager that writes a round's sample predictions, for the page and for TensorBoard.

    Parameters
    ----------
    run : the run folder.
    classes : all classes of the study.
    sampler : has taken the round's cases.
    evaluated : has the round's result.
    """

    def __init__(self, run: RunFolder, classes: Sequence[str], sampler: Sampler, evaluated: Evaluated) -> None:
        self._run = run
        self._classes = classes
        self._sampler = sampler
        self._evaluated = evaluated
        self._thread = ThreadPoolExecutor(1, "wardround-samples")
        self._images: Any = None

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics; what is shown of them is written later."""
        if "holdout" in value and self._evaluated.latest is not None:  # of a round without, the latest is older
            taken = self._sampler.taken([float(dice) for dice in self._evaluated.latest.dice_of_cases])
            self._thread.submit(self._write, key, taken)

    async def close(self) -> None:
        """Waits until everything is written."""
        await asyncio.to_thread(self._thread.shutdown)

    def _write(self, number: int, taken: Sequence[Taken]) -> None:
        try:
            write_samples(self._run.path, number, self._classes, taken)
            self._to_tensorboard(number, taken)
        except Exception as error:  # pictures are for watching; the rounds go on without
            _log.warning("round %d has no sample pictures in TensorBoard (%s)", number, type(error).__name__)

    def _to_tensorboard(self, number: int, taken: Sequence[Taken]) -> None:
        """A strip of image, truth, prediction and difference for each slice, in a TensorBoard run of its own."""
        import tensorflow as tf

        if (
            self._images is None
        ):  # a folder of its own: TensorBoard reads the files of one in order, and never goes back
            self._images = tf.summary.create_file_writer(str(self._run.tensorboard / "samples"))
        with self._images.as_default():
            for case in taken:
                strips = [np.concatenate(list(pictures(view).values()), axis=1) for view in case.views]
                tf.summary.image(f"samples/{case.case}", np.stack(strips), step=number, max_outputs=len(strips))
        with contextlib.suppress(tf.errors.OpError):
            self._images.flush()
        release_memory()
