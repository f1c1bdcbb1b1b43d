"""A published model as a function of tiles, run by LiteRT; nothing in here needs TensorFlow."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import PublishError

Head = Literal["softmax", "sigmoid", "distance"]
"""What a model's outputs are (`Model.head` of a study)."""

_stderr_lock = threading.RLock()
_has_greeted = threading.Event()


class LiteModel:
    """A `.tflite` file with one input (batch, *tile, channel) and one output (batch, *tile, outputs), both float32.

    Parameters
    ----------
    path : the file; it is mapped into memory, not copied.
    threads : that one call uses.
    delegate : a shared library that runs the model's operations on a GPU or NPU, built for LiteRT's external delegates
        (`tflite_plugin_create_delegate`). What it does not take, and everything where there is none, runs on XNNPACK,
        the CPU's. It is foreign code, run in this process.

    Attributes
    ----------
    input_shape, output_shape : with the batch that the model was exported with.
    input_dtype, output_dtype : names of NumPy types.

    May be called from several threads: each gets an interpreter of its own, which lives as long as the thread.

    Raises
    ------
    PublishError : the file is missing, damaged, or has other inputs and outputs; or the delegate cannot be loaded or
        refuses the model.
    """

    def __init__(self, path: Path, threads: int = 1, delegate: Path | None = None) -> None:
        self.path = path
        self._threads = threads
        self._delegate = delegate
        self._local = threading.local()
        inputs, outputs = self._interpreter().get_input_details(), self._interpreter().get_output_details()
        if len(inputs) != 1 or len(outputs) != 1 or {inputs[0]["dtype"], outputs[0]["dtype"]} != {np.float32}:
            raise PublishError(
                f"{path}: expected one float32 input and one float32 output, found {_described(inputs)} and "
                f"{_described(outputs)}; use a file that Wardround published"
            )
        self._input, self._output = int(inputs[0]["index"]), int(outputs[0]["index"])
        self.input_shape = tuple(int(size) for size in inputs[0]["shape"])
        self.output_shape = tuple(int(size) for size in outputs[0]["shape"])
        self.input_dtype = np.dtype(inputs[0]["dtype"]).name
        self.output_dtype = np.dtype(outputs[0]["dtype"]).name

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Probabilities (b, *tile, outputs) of prepared tiles (b, *tile, channel); b a multiple of the model's batch.

        Raises
        ------
        ValueError : the tiles are not of the model's shape.
        PublishError : LiteRT cannot run the model.
        """
        step = self.input_shape[0]
        if batch.shape[1:] != self.input_shape[1:] or not len(batch) or len(batch) % step:
            raise ValueError(f"{self.path.name}: expected tiles of shape {self.input_shape}, found {batch.shape}")
        interpreter = self._interpreter()
        batch = np.ascontiguousarray(batch, dtype=np.float32)
        answers = []
        for first in range(0, len(batch), step):
            interpreter.set_tensor(self._input, batch[first : first + step])
            try:
                interpreter.invoke()
            except RuntimeError as error:
                raise PublishError(f"{self.path}: LiteRT cannot run it ({error}); publish or copy it again") from error
            answers.append(interpreter.get_tensor(self._output))
        return np.asarray(np.concatenate(answers), dtype=np.float32)

    def _interpreter(self) -> Any:
        """The calling thread's interpreter."""
        if not hasattr(self._local, "interpreter"):
            # LiteRT greets on stderr with its first interpreter in a process, and only then.
            with contextlib.nullcontext() if _has_greeted.is_set() else captured_stderr():
                self._local.interpreter = self._open()
            _has_greeted.set()
        return self._local.interpreter

    def _open(self) -> Any:
        from ai_edge_litert.interpreter import Interpreter

        try:
            # Without delegates first: what fails here is the file's fault. XNNPACK is among LiteRT's defaults.
            interpreter = Interpreter(model_path=str(self.path), num_threads=self._threads)
            if self._delegate is None:
                interpreter.allocate_tensors()
                return interpreter
        except (ValueError, RuntimeError, OSError) as error:
            raise PublishError(
                f"{self.path}: cannot be loaded as a LiteRT model ({_first_line(error)}); copy it again from where it "
                "was published"
            ) from error
        loaded = _loaded_delegate(self._delegate)  # one an interpreter: delegates need not be safe to share
        try:
            interpreter = Interpreter(
                model_path=str(self.path), num_threads=self._threads, experimental_delegates=[loaded]
            )
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise PublishError(
                f"{self._delegate}: this delegate refuses {self.path.name} ({_first_line(error)}); try another variant "
                "of the model, or run it without a delegate"
            ) from error
        return interpreter


def _loaded_delegate(library: Path) -> Any:
    """LiteRT's handle of a delegate. Raises PublishError where the library is none for this machine."""
    from ai_edge_litert.interpreter import load_delegate

    advice = "give the delegate's shared library, built for this machine, or run without a delegate"
    if not library.is_file():
        raise PublishError(f"{library}: there is no such delegate library; {advice}")
    try:
        # Looked at before LiteRT does, which complains on stderr about a handle that it never made.
        symbols = ctypes.PyDLL(str(library.resolve()))
        for name in ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate"):
            if not hasattr(symbols, name):
                raise PublishError(f"{library}: no LiteRT delegate, it lacks {name}; {advice}")
        return load_delegate(str(library.resolve()))
    except (OSError, ValueError, RuntimeError) as error:
        # The loader names the file in full, then its reason.
        reason = str(error).replace(f"{library.resolve()}: ", "").replace("\n", " ").strip() or type(error).__name__
        raise PublishError(f"{library}: cannot be loaded as a delegate ({reason}); {advice}") from error


def class_indices(probabilities: npt.NDArray[np.float32], head: Head) -> npt.NDArray[np.uint8]:
    """The class of every voxel, uint8 of shape (spatial...), from probabilities (spatial..., outputs).

    softmax: the likeliest class. sigmoid: the likeliest foreground class where it is above 0.5, else background; the
    outputs are the foreground classes. Of equals the first. distance: 1 where the first output, the foreground, is
    above 0.5.
    """
    if head == "distance":
        return np.asarray(probabilities[..., 0] > 0.5, dtype=np.uint8)
    best = np.argmax(probabilities, axis=-1)
    if head == "sigmoid":
        best = np.where(np.max(probabilities, axis=-1) > 0.5, best + 1, 0)
    return np.asarray(best, dtype=np.uint8)


@contextlib.contextmanager
def captured_stderr() -> Iterator[IO[bytes]]:
    """Send what the process writes to stderr to the file that is yielded, C++ libraries included.

    The file descriptor is the process's, so this holds for all threads: keep the time short. Threads take turns.
    """
    with _stderr_lock, tempfile.TemporaryFile() as file:
        try:
            _flush_stderr()
            saved = os.dup(2)
        except OSError:  # closed, as daemons do
            yield file
            return
        try:
            os.dup2(file.fileno(), 2)
            yield file
        finally:
            _flush_stderr()
            os.dup2(saved, 2)
            os.close(saved)


def _flush_stderr() -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _described(details: list[dict[str, Any]]) -> str:
    return ", ".join(f"{np.dtype(d['dtype']).name}{[int(size) for size in d['shape']]}" for d in details) or "none"
