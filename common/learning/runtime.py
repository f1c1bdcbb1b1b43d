"""How TensorFlow runs in this process: the threads that the plan fixes, and no noise on the terminal."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import sys

from common.errors import TrainingError


def release_memory() -> None:
    """Give back to the system what compiling left behind: at 31M weights a fifth of a coordinator's memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def configure_tensorflow(threads: int) -> None:
    """Set TensorFlow up before its first operation.

    Parameters
    ----------
    threads : intra-op threads. They are part of the plan: sums split over another number of threads have other bits.
        Graphs run side by side on as many threads as there are cores.

    Raises
    ------
    TrainingError : TensorFlow is running already with another number of threads.
    """
    import tensorflow as tf

    # TFF's executor, unused, fails to clean up after itself once the interpreter has taken its modules apart.
    atexit.register(setattr, sys, "unraisablehook", lambda unraisable: None)
    tf.get_logger().setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(max(2, os.cpu_count() or 1))
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        running = tf.config.threading.get_intra_op_parallelism_threads()
        if running != threads:
            raise TrainingError(
                f"training.threads: the plan asks for {threads}, but TensorFlow runs with {running} in this process; "
                "start studies of different threads in processes of their own"
            ) from None
