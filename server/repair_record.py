"""What `wardround repair` does to a run, in the run's audit log before it is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Final

from common.security.audit import AuditDamagedError, AuditLog
from common.security.audit_files import LOG
from server.run_folder import COORDINATOR, RunFolder

_MOST_FINDINGS: Final = 100  # in an entry, whose line is bounded
_MOST_LETTERS: Final = 300


def findings_of(found: Iterable[tuple[str, str]]) -> list[str]:
    """Paths within the run and what is wrong with each, as they are recorded; the number of those that are too many."""
    texts = [f"{path}: {problem}"[:_MOST_LETTERS] for path, problem in found]
    more = len(texts) - _MOST_FINDINGS
    return texts if more <= 0 else [*texts[:_MOST_FINDINGS], f"and {more} more"]


def record(run: RunFolder, event: str, **details: object) -> None:
    """Adds an entry, whose head the coordinator signs when it goes on.

    A run without a log gets none, which would look whole. One that is damaged is left alone, with a warning: what else
    is damaged can be repaired all the same.

    Raises
    ------
    RunFolderError : it cannot be written.
    """
    if not (run.path / LOG).exists():
        return
    try:
        with contextlib.closing(AuditLog(run.path, COORDINATOR)) as audit:
            audit.record(event, **details)
    except AuditDamagedError as error:
        print(f"warning: not recorded: {error}", file=sys.stderr)
