"""Keeps `status.json` current: written at once when something happens, at most four times a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from common.errors import RunFolderError
from common.study import Study
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from server.access import Access
    from server.federation import Federation
    from server.rounds import Answer

_log = logging.getLogger("wardround.coordinator")
_SHORTEST_INTERVAL = 0.25
_LONGEST_INTERVAL = 5.0  # while sites are at work: that nothing happens is to be seen too


class StatusWriter:
    """The coordinator's public face; `wardround status` and the simulation's display read what it writes."""

    def __init__(self, run: RunFolder, study: Study) -> None:
        self._run = run
        self._study = study
        self._dirty = asyncio.Event()
        self._started = time.time()
        self._failing = False
        self._seen: dict[str, float] = {}  # when a site was connected last, Unix time
        self._cases: dict[str, tuple[int, int]] = {}  # of training and validation, as the site last said
        self.federation: Federation | None = None
        self.access: Access | None = None
        self.fields: dict[str, Any] = {
            "state": "starting",
            "address": None,
            "notice": "",
            "error": "",
            "last": None,
            "best": None,
            "published": None,
        }
        with contextlib.suppress(RunFolderError):  # figures hold until there are newer ones
            before = run.read_status()
            self.fields |= {name: before.get(name) for name in ("last", "best")}

    def set(self, **fields: Any) -> None:
        """Change fields and let them be written."""
        self.fields.update(fields)
        self.changed()

    def changed(self) -> None:
        """Something that status shows has changed."""
        self._dirty.set()

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                at_work = self.federation is not None and self.federation.call is not None
                async with asyncio.timeout(_LONGEST_INTERVAL if at_work else None):
                    await self._dirty.wait()
            self._dirty.clear()
            try:
                await asyncio.to_thread(self._run.write_status, self._snapshot())
                self._failing = False
            except RunFolderError as error:  # a full disk stops the round itself, in its own words
                if not self._failing:
                    _log.warning("%s", error)
                self._failing = True
            await asyncio.sleep(_SHORTEST_INTERVAL)

    def write(self) -> None:
        """Writes now. Raises RunFolderError."""
        self._run.write_status(self._snapshot())

    def _snapshot(self) -> dict[str, Any]:
        federation = self.federation
        call = federation.call if federation is not None else None
        connections = federation.connections if federation is not None else {}
        sites: dict[str, dict[str, Any]] = {}
        self._seen |= dict.fromkeys(connections, time.time())
        self._cases |= {name: (one.training_cases, one.validation_cases) for name, one in connections.items()}
        for name in self._study.cohort.sites:
            connection = connections.get(name)
            answer = call.round.answers.get(name) if call is not None else None
            idle = federation.idle_seconds(name) if federation is not None else None
            training_cases, validation_cases = self._cases.get(name, (0, 0))
            sites[name] = {
                "connected": connection is not None,
                "stage": answer.stage.value if answer is not None else "waiting",
                "batch": answer.batch if answer is not None else 0,
                "batches": answer.batches if answer is not None else 0,
                "reason": answer.reason if answer is not None else "",
                "refused_reason": federation.rejected.get(name, "") if federation is not None else "",
                "asked": call is None or name in call.round.asked,
                "no_progress_seconds": round(idle) if idle is not None else None,
                "training_cases": training_cases,
                "validation_cases": validation_cases,
                "last_seen_at": self._seen.get(name),
                "seconds": _seconds(answer),
            }
            if self.access is not None:
                revoked = self.access.revoked("site", name)
                sites[name]["revoked"] = revoked is not None
                sites[name]["certificate_expires"] = self.access.expiries.get(name)
            if federation is not None and name in federation.spent:
                sites[name]["epsilon"] = federation.spent[name]
        fields = dict(self.fields)
        if call is not None and fields["state"] not in ("failed", "stopped"):
            able = len([name for name in call.round.asked if name in connections or not call.round.wants(name)])
            working = "training" if call.round.kind.value == "train" else "evaluating"
            fields["state"] = working if able >= call.round.needed else "waiting for sites"
        elif fields["state"] == "waiting for sites" and federation is not None and federation.begun:
            fields["state"] = "evaluating"  # on the holdout, between the cohort's calls
        if federation is not None and federation.notice:
            fields["notice"] = federation.notice
        last = (fields["last"] or {}).get("round", 0)
        begun = fields["state"] not in ("starting", "waiting for sites") or (
            federation is not None and federation.begun
        )
        return {
            "study": self._study.name,
            "plan": federation.plan.digest.hex() if federation is not None else None,
            "pid": os.getpid(),
            "round": call.round.number if call is not None else last if begun else 0,
            "rounds": self._study.training.rounds,
            "quorum": self._study.cohort.quorum,
            "needed": call.round.needed if call is not None else self._study.cohort.quorum,
            "closed_with": list(call.round.fixed) if call is not None and call.round.fixed is not None else None,
            "attempt": call.round.attempt if call is not None else 1,
            "kind": call.round.kind.value if call is not None else None,
            "round_started_at": call.started - time.monotonic() + time.time() if call is not None else None,
            "deadline_at": call.deadline - time.monotonic() + time.time() if call is not None else None,
            "sites": sites,
            "started_at": self._started,
            "updated_at": time.time(),
            "privacy": federation.privacy if federation is not None else None,
            **fields,
        }


def _seconds(answer: Answer | None) -> dict[str, float] | None:
    """How long a site was at the parts of its answer; None before that is here."""
    if answer is None or answer.update is None:
        return None
    work = {"download": answer.seconds_download, "work": answer.seconds_work, "upload": answer.seconds_upload}
    return {part: round(seconds, 3) for part, seconds in work.items()}
