"""What a site's page shows, from its work folder: plain values; what cannot be read says so in its place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.approvals import APPROVALS_FILE, Approvals
from client.audit_summary import summary_of
from client.site_status import read_status
from common.disk import file_stamp
from common.errors import WardroundError
from common.security.audit_check import check_log
from common.security.audit_files import HEAD, LOG
from common.security.authorities import Authority

_MOST_ROUNDS = 40


@dataclass(frozen=True)
class SiteReading:
    """A work folder at one moment.

    Attributes
    ----------
    status : as `client.site_status.read_status` gives it; empty where no site was started here.
    left : what left, as `client.audit_summary.summary_of` gives it; empty where there is no log.
    log : the checked log's report.
    approvals : the decisions, the newest first: "decision", "by", "day", "study", "site".
    troubles : what could not be read, by part: "status", "left", "approvals".
    """

    read_at: float
    status: Mapping[str, Any]
    left: Mapping[str, Any]
    log: Mapping[str, Any]
    approvals: tuple[Mapping[str, Any], ...]
    troubles: Mapping[str, str] = field(default_factory=dict)


class SiteReader:
    """Reads a work folder again and again; the audit log is checked anew only when it has grown."""

    def __init__(self, work: Path, authority: Authority | None) -> None:
        self._work = work
        self._authority = authority
        self._log_stamp: Any = None
        self._left: tuple[Mapping[str, Any], Mapping[str, Any], str] = ({}, {}, "")

    def stamp(self) -> tuple[Any, Any]:
        """What changes whenever there may be something new: of the log and the approvals, and of the status."""
        at_once = [file_stamp(self._work / name) for name in (LOG, HEAD, APPROVALS_FILE)]
        return at_once, file_stamp(self._work / "status.json")

    def read(self) -> SiteReading:
        """The folder as it is now."""
        troubles: dict[str, str] = {}
        status: Mapping[str, Any] = {}
        try:
            status = read_status(self._work)
        except WardroundError as error:
            troubles["status"] = str(error)
        log_stamp = file_stamp(self._work / LOG), file_stamp(self._work / HEAD)
        if log_stamp != self._log_stamp:
            self._left, self._log_stamp = self._checked(), log_stamp
        left, log, trouble = self._left
        if trouble:
            troubles["left"] = trouble
        approvals: tuple[Mapping[str, Any], ...] = ()
        try:
            identity = Path(status["identity"]) if status.get("identity") else None
            records = Approvals(self._work, identity).records()
            approvals = tuple(
                {
                    "decision": "approved" if record.decision == "approve" else "rejected",
                    "by": record.by,
                    "day": record.day,
                    "study": str(record.content.get("study", "")),
                    "site": str(record.content.get("site", "")),
                    "package": str(record.content.get("package", "")),
                }
                for record in reversed(records)
            )
        except WardroundError as error:
            troubles["approvals"] = str(error)
        return SiteReading(time.time(), status, left, log, approvals, troubles)

    def _checked(self) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
        if not (self._work / LOG).exists():
            return {}, {}, ""
        try:
            checked = check_log(self._work, self._authority)
            return summary_of(checked.entries, checked.path), checked.report(), ""
        except WardroundError as error:
            return {}, {}, str(error)


def newest(sent: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest of what was sent, first."""
    return list(reversed(sent))[:_MOST_ROUNDS]
