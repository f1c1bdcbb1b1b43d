"""Where a round's time went: download, training, upload, waiting, aggregation; by site, and as the round's own.

A site measures its download and its work, the coordinator everything else. A round's parts are those of the site that
it waited for last, as all other sites worked meanwhile; so they add up to the whole, and what is long in them is what
made the round long.

    >>> parts = RoundParts.of(closed=61.0, ended=64.0, last=SiteParts("north", 5.0, 40.0, 6.0, arrived=60.0))
    >>> parts.download, parts.training, parts.upload, parts.waiting, parts.aggregation
    (5.0, 40.0, 6.0, 10.0, 3.0)
    >>> parts.slowest_site
    'north'
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.calls import Call

PARTS = ("download", "training", "upload", "waiting", "aggregation")
"""The parts of a call of the cohort, in order."""
ROUND_PARTS = (*PARTS, "evaluation")
"""The parts of a round: a training call, then what sites and holdout say of its weights."""


@dataclass(frozen=True)
class SiteParts:
    """Seconds that a site's answer took, and when it was here, in seconds since the call began."""

    site: str
    download: float
    training: float
    upload: float
    arrived: float


@dataclass(frozen=True)
class RoundParts:
    """Seconds of a call of the cohort; they add up to its whole length.

    Attributes
    ----------
    download, training, upload : of the site whose answer came last. Of an answer that was here before the call began,
        as the coordinator was started again, nothing counts.
    waiting : the rest until the round closed: tasks that wait for a site to dial, its pauses, deadlines that passed.
    aggregation : from the round's closing until the new weights were there.
    slowest_site : whose answer came last; "" where no site answered.
    """

    download: float
    training: float
    upload: float
    waiting: float
    aggregation: float
    slowest_site: str

    @staticmethod
    def of(*, closed: float, ended: float, last: SiteParts | None) -> RoundParts:
        """The parts of a call that closed and ended so many seconds after it began."""
        left = max(0.0, min(closed, last.arrived)) if last is not None else 0.0
        spent = []
        for seconds in (last.upload, last.training, last.download) if last is not None else ():
            spent.append(min(seconds, left))  # from the end on: what was done in an earlier process comes first
            left -= spent[-1]
        upload, training, download = spent or (0.0, 0.0, 0.0)
        return RoundParts(
            download=download,
            training=training,
            upload=upload,
            waiting=max(0.0, closed - download - training - upload),
            aggregation=max(0.0, ended - closed),
            slowest_site=last.site if last is not None else "",
        )

    def columns(self) -> OrderedDict[str, float | str]:
        """As `rounds.csv` has them: ``seconds_<part>``, and who was the slowest."""
        columns: OrderedDict[str, float | str] = OrderedDict(
            (f"seconds_{part}", round(float(getattr(self, part)), 3)) for part in PARTS
        )
        columns["slowest_site"] = self.slowest_site
        return columns


def parts_of(call: Call, now: float) -> RoundParts:
    """Where the time of a closed call went, at its end; `now` by `time.monotonic()`."""
    answers = [
        SiteParts(
            site,
            answer.seconds_download,
            answer.seconds_work,
            answer.seconds_upload,
            arrived=(answer.arrived if answer.arrived is not None else call.started) - call.started,
        )
        for site, answer in call.round.answers.items()
        if answer.update is not None
    ]
    closed = (call.closed_at if call.closed_at is not None else now) - call.started
    last = max(answers, key=lambda answer: answer.arrived, default=None)
    return RoundParts.of(closed=closed, ended=now - call.started, last=last)
