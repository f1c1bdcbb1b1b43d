"""Why a file could not be read, in few words: the decoders' own messages, made fit for a `ReadError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.imaging.readers.faults import Fault, ReadError


def reason_of(error: Exception) -> str:
    """The first line of an exception's message, at most 160 characters, without a full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Make a `ReadError` that names a file of whatever its decoding raises."""
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        raise ReadError(
            Fault.UNREADABLE,
            f"{name} cannot be read as DICOM ({reason_of(error)}). The file is damaged or incomplete: copy it again "
            "from its source.",
        ) from error
