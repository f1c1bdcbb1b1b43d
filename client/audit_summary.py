"""What left this hospital: a site's audit log on one page, by study and round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.security.audit import Entry, damaged
from common.security.audit_check import CheckedLog
from common.wording import counted, printable

NEVER = (
    "images and labels, whole or in part",
    "names of files and folders, identifiers and data of patients, DICOM headers",
    "figures of single cases, where this site validates on more than one",
)
"""What no version of Wardround sends (docs/what-leaves.md has every field that is sent)."""
_DIGITS = 12


def summary_of(entries: Iterable[Entry], path: Path) -> dict[str, Any]:
    """Plain values: "studies", each with its "sent" by round and kind, and counts of all else that was said.

    Raises
    ------
    AuditDamagedError : an entry of the log at `path` has other details than a site records.
    """
    studies: dict[tuple[str, str], dict[str, Any]] = {}
    asked = 0
    study: dict[str, Any] | None = None
    for entry in entries:
        details = entry.details
        if entry.event == "started":
            key = str(details.get("study")), str(details.get("plan"))
            study = studies.setdefault(key, _empty(*key))
            study["starts"] += 1
            study |= {name: details.get(name) for name in ("training_cases", "validation_cases")}
        elif entry.event == "model-asked-for":
            asked += 1
        elif study is not None:
            try:
                _add(study, entry)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise damaged(
                    path, f"entry {entry.sequence} ({entry.event}) has not the details that a site records of it"
                ) from error
    for one in studies.values():
        one["sent"] = sorted(one["sent"].values(), key=lambda sent: (sent["round"], sent["kind"] != "train"))
        one["bytes"] = sum(sent["bytes"] for sent in one["sent"])
    return {"studies": list(studies.values()), "models_asked_for": asked, "never_leaves": list(NEVER)}


def _empty(study: str, plan: str) -> dict[str, Any]:
    return {
        "study": study,
        "plan": plan,
        "starts": 0,
        "dials": 0,
        "connections": 0,
        "progress_messages": 0,
        "failure_messages": 0,
        "asked_after": 0,
        "sent": {},
    }


def _add(study: dict[str, Any], entry: Entry) -> None:
    details = entry.details
    study["progress_messages"] += int(details.get("progress_messages", 0))
    study["dials"] += entry.event == "dialled"
    study["connections"] += entry.event == "connected"
    study["failure_messages"] += entry.event == "failure-sent"
    study["asked_after"] += entry.event == "update-asked-after"
    if entry.event not in ("update-sent", "update-answered"):
        return
    key = int(details["round"]), str(details["kind"]), str(details["sha256"])
    sent = study["sent"].get(key)
    if entry.event == "update-sent":
        if sent is None:
            sent = study["sent"][key] = {
                "round": key[0],
                "kind": key[1],
                "contents": str(details["contents"]),
                "sha256": key[2],
                "cases": details["cases"],
                "times": 0,
                "bytes": 0,
                "first": entry.time,
                "taken": None,
            }
        sent["times"] += 1
        sent["bytes"] += int(details["bytes"])
    elif sent is not None:
        sent["taken"] = details["accepted"]


def summary_text(found: Mapping[str, Any], checked: CheckedLog) -> str:
    """The page."""
    lines = ["What left this hospital", ""]
    for study in found["studies"]:
        lines += [*_study(study), ""]
    if not found["studies"]:
        lines += ["Nothing: this site has taken part in no study yet.", ""]
    if found["models_asked_for"]:
        lines += [
            f"A published model was asked for {counted(found['models_asked_for'], 'time')}: its version's name.",
            "",
        ]
    lines.append("What never leaves:")
    lines += [f"  - {what}" for what in found["never_leaves"]]
    lines += ["", "By the log:", checked.text()]
    return "\n".join(lines)


def _study(study: Mapping[str, Any]) -> list[str]:
    sent: Sequence[Mapping[str, Any]] = study["sent"]
    head = f"Study {printable(study['study'])}, plan {study['plan'][:16]}"
    if not sent:
        return [f"{head}: no update was sent", *_besides(study)]
    total = f"{counted(len(sent), 'update')}, {study['bytes']:,} bytes in all"
    rows = [("round", "kind", "bytes", "sent", "taken", "cases", "SHA-256", "since (UTC)")]
    for one in sent:
        taken = "no answer" if one["taken"] is None else "yes" if one["taken"] else "no"
        times = f"{one['times']}x"
        cells = (one["round"], one["kind"], f"{one['bytes']:,}", times, taken, one["cases"], one["sha256"][:_DIGITS])
        rows.append((*map(str, cells), one["first"][:19]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    what = [f"  {kind}: {contents}" for kind, contents in {one["kind"]: one["contents"] for one in sent}.items()]
    return [f"{head}: {total}", *table, *what, *_besides(study)]


def _besides(study: Mapping[str, Any]) -> list[str]:
    unanswered = study["dials"] - study["connections"]
    dials = f" and {counted(unanswered, 'dial')} without an answer" if unanswered > 0 else ""
    return [
        f"  besides: {counted(study['connections'], 'connection')}{dials}, each with this version and the numbers of "
        f"cases ({study['training_cases']} training, {study['validation_cases']} validation);",
        f"  {counted(study['progress_messages'], 'message')} about progress (stage, batch of batches), "
        f"{study['failure_messages']} about failures, {study['asked_after']} asking whether an update was taken",
    ]
