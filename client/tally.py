"""What a site has moved and how long it took, since its process began: for its status and its metrics."""

from __future__ import annotations

from typing import Any

from client.outbox import PendingUpdate


class Tally:
    """Adds up what a site's tasks moved; each method returns the fields of the status that change."""

    def __init__(self) -> None:
        self._bytes = {"down": 0, "up": 0}
        self._answers = {"taken": 0, "refused": 0}

    def downloaded(self, size: int) -> dict[str, Any]:
        """So many bytes of a broadcast came."""
        self._bytes["down"] += size
        return {"bytes": dict(self._bytes)}

    def uploaded(self, size: int) -> None:
        """So many bytes of an update are about to go."""
        self._bytes["up"] += size

    def answered(self, update: PendingUpdate, seconds: float, *, accepted: bool) -> dict[str, Any]:
        """An update has its receipt, after so many seconds of upload."""
        self._answers["taken" if accepted else "refused"] += 1
        work = {"download": update.download, "work": update.work, "upload": seconds}
        last = {"kind": update.key.kind, "round": update.key.number, "cases": update.cases, "accepted": accepted}
        last["seconds"] = {part: round(value, 3) for part, value in work.items()}
        return {"bytes": dict(self._bytes), "answers": dict(self._answers), "last": last}
