"""How TensorFlow runs in this process: the threads that the plan fixes, and no noise on the terminal."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import sys

from common.errors import TrainingError

_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8  # malloc.h
_KEPT_BYTES = 2**24


def keep_little_memory() -> None:
    """Have this process give memory back that it no longer uses; call it before TensorFlow is loaded.

    TensorFlow keeps the memory of tensors that are gone for those to come, and the C library keeps a heap for every few
    threads. That makes training faster; a coordinator, which holds a few large tensors for moments, would hold a third
    more than it needs.
    """
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
    _c_library("mallopt", _M_ARENA_MAX, 2)
    _c_library("mallopt", _M_TRIM_THRESHOLD, _KEPT_BYTES)


def release_memory() -> None:
    """Give back to the system what is no longer used; takes a few milliseconds."""
    _c_library("malloc_trim", 0)


def _c_library(function: str, *arguments: int) -> None:
    """Calls a function that only glibc has."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


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
