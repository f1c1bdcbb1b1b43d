"""Named places in the code at which a test can make the process die, stop, wait, or meet a failing disk.

Nothing happens unless the environment variable `WARDROUND_FAILPOINTS` was set when this module was loaded. It holds
`name[@k]=action`, separated by commas: at the k-th time (the first, unless said) that the code comes by `name`,

- `kill` ends the process by SIGKILL, as a power cut does to it;
- `stop` halts it by SIGSTOP, as a machine does that hangs;
- `sleep:SECONDS` waits, in the thread that comes by;
- `error:ENOSPC`, `error:EROFS`, `error:EIO` raise an `OSError`, as a full, read-only or broken disk does; from the k-th
  time on, since a disk does not mend itself.

    >>> actions = parse("state.before@2=error:ENOSPC, publish.renamed=kill")
    >>> [(name, action.at, action.verb, action.value) for name, action in actions.items()]
    [('state.before', 2, 'error', 'ENOSPC'), ('publish.renamed', 1, 'kill', '')]
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UsageError

VARIABLE = "WARDROUND_FAILPOINTS"
ERRNOS: Mapping[str, int] = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EIO": errno.EIO}

COORDINATOR: Mapping[str, str] = {
    "round.opened": "the round was journaled as opened; no site has its task",
    "round.closing": "enough updates are here; the close is not journaled",
    "round.closed": "the close is journaled; nothing of it is known to anyone else",
    "secure.asked": "a secure sum was journaled as asked for; no site knows",
    "secure.unmasking": "unmasking was journaled; no site is asked for its shares",
    "secure.unmasked": "a secure sum is known, and on no disk",
    "secure.summed": "a secure sum is on disk and journaled",
    "round.summed": "all updates of the round are summed",
    "round.updated": "the new state is computed, on no disk",
    "journal.before": "before an event is appended to the journal, each",
    "journal.after": "an event is in the journal, each",
    "update.partial": "half of an upload's bytes are on disk",
    "update.stored": "an update is on disk and verified, not journaled",
    "update.journaled": "an update is journaled; its receipt is not sent",
    "receipt.sent": "the receipt was handed to the network",
    "blob.before_rename": "a tensor file is written and synced under its temporary name",
    "blob.renamed": "a tensor file is in its place",
    "state.before": "before a round's state is written",
    "state.saved": "a round's state is on disk and journaled",
    "model.before": "before a round's model is written",
    "model.released": "a round's model is on disk and journaled",
    "metrics.before": "before a round's row is written to a table",
    "metrics.released": "a round's row is in a table",
    "sites_csv.before": "before a closed round's rows are written to sites.csv",
    "sites_csv.written": "a closed round's rows are in sites.csv",
    "updates.removed": "the updates of a round that is saved were removed",
    "models.removed": "models that are neither the best nor the last were removed",
    "study.trained": "the end of training is journaled; nothing is published",
    "publish.before": "before the version's folder is begun",
    "publish.renamed": "the version's folder is in its place; the report is not written",
    "report.before": "before the report is written",
    "report.written": "the report is on disk; the journal does not say so",
    "status.before": "before status.json is written",
}
SITE: Mapping[str, str] = {
    "site.task": "a task arrived; nothing is done for it",
    "site.broadcast_partial": "half of a broadcast's bytes are on disk",
    "site.broadcast": "the broadcast is on disk, whole and verified",
    "site.batch": "a batch of training, each",
    "site.trained": "the update is computed, on no disk",
    "privacy.secret": "a private round's secret is on disk; nothing is drawn from it",
    "privacy.before": "a private round is computed and not counted",
    "privacy.counted": "a private round is counted; its update is on no disk",
    "site.held": "the update is on disk; nothing of it is sent",
    "site.upload_partial": "half of the update's bytes are sent",
    "secure.masked": "the masked update is made; nothing of it is sent",
    "secure.begun": "the site's ledger says that it unmasks; its shares are not sent",
    "site.uploaded": "the whole update is sent; the receipt is not here",
    "site.receipt": "the receipt is here; the site's own copy is still on disk",
    "site.released": "the site's own copy of the update is removed",
}
IDENTITY: Mapping[str, str] = {
    "enrolment.before": "certificates are made, the invitation is not marked as used on the disk",
    "enrolment.used": "the invitation is marked as used on the disk; nobody has the certificates",
    "enrolled.keys": "the site's keys are on its disk; nothing is sent",
    "enrolled.answer": "the certificates are at the site, on no disk of it",
    "enrolled.half": "the certificates are on the site's disk, save the one by which it is an identity",
    "rotation.answer": "the new certificates are on the site's disk, not tried",
    "rotation.confirmed": "the new identity works; the site still has the old one",
    "rotation.half": "some of the new identity's files are in place",
}
NAMES: Mapping[str, str] = {**COORDINATOR, **SITE, **IDENTITY}


@dataclass(frozen=True)
class Action:
    """What happens, and at which time of coming by (1 is the first)."""

    verb: str
    value: str
    at: int


def parse(text: str) -> dict[str, Action]:
    """The actions by name.

    Raises
    ------
    UsageError : a name, an action or its value is unknown.
    """
    found: dict[str, Action] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        place, _, action = part.partition("=")
        name, _, at = place.partition("@")
        verb, _, value = action.partition(":")
        if name not in NAMES:
            raise UsageError(f"{VARIABLE}: no failpoint is named {name!r}; there are: {', '.join(NAMES)}")
        if not (at == "" or (at.isdigit() and int(at) > 0)):
            raise UsageError(f"{VARIABLE}: {part!r}: expected a positive number after @, found {at!r}")
        known = (
            (verb in ("kill", "stop") and not value)
            or (verb == "sleep" and value.replace(".", "", 1).isdigit())
            or (verb == "error" and value in ERRNOS)
        )
        if not known:
            raise UsageError(
                f"{VARIABLE}: {part!r}: expected kill, stop, sleep:SECONDS or error:{'|'.join(ERRNOS)} after ="
            )
        found[name] = Action(verb, value, int(at or 1))
    return found


_actions = parse(os.environ.get(VARIABLE, ""))
_counts: dict[str, int] = {}
_lock = threading.Lock()


def hit(name: str) -> None:
    """The code comes by the failpoint `name`, one of `NAMES`. Raises OSError where the action is `error`."""
    action = _actions.get(name)
    if action is not None:
        _act(name, action)


def _act(name: str, action: Action) -> None:
    with _lock:
        count = _counts[name] = _counts.get(name, 0) + 1
    if action.verb == "error":
        if count >= action.at:
            number = ERRNOS[action.value]
            raise OSError(number, os.strerror(number))
        return
    if count != action.at:
        return
    if action.verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.verb == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(float(action.value))
