"""A round whose updates are stored as they are: until all are in, or enough at the deadline, and their sum."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import TrainingError, WireError
from common.learning.plan import RoundPlan
from common.learning.runtime import release_memory
from common.watching.logs import about
from common.wire.tensors import Stored, TensorFile, read_tensors
from server.calls import Call, Host, check_budgets
from server.replay import Received, RoundHistory
from server.rounds import Kind
from server.run_folder import plainly, set_aside

_log = logging.getLogger("wardround.coordinator")


class PlainRound:
    """One call of the cohort whose updates are summed in site-name order, as far as they are in.

    Parameters
    ----------
    host : the federation.
    call : the round.
    updates : the folder in which its updates lie.
    """

    def __init__(self, host: Host, call: Call, updates: Path) -> None:
        self._host, self._call, self._updates = host, call, updates

    async def run(self) -> list[Any]:
        """The report over all included updates; the round is closed then."""
        closing, summing = asyncio.create_task(self._until_closed()), asyncio.create_task(self._sum())
        try:
            await asyncio.gather(closing, summing)
            return summing.result()
        finally:
            closing.cancel()
            summing.cancel()

    def restore(self, known: RoundHistory, first_answered: Mapping[str, int]) -> None:
        """Goes on with this very round as the coordinator left it when it was last stopped.

        `first_answered`: since this process began, the earliest round of each site.
        """
        call, round_ = self._call, self._call.round
        round_.attempt = known.attempt
        for site, reason in known.refused.items():
            round_.refused(site, reason)
        round_.fixed = known.closed
        for site, received in known.received.items():
            if self._outdated(site, received, first_answered):
                continue
            path = self._updates / received.file
            digest = bytes.fromhex(received.sha256)
            try:
                read_tensors(path, call.plan.sent, digest)
            except WireError as error:  # the site is asked again, and sends the same bits
                what = plainly(str(error)).removeprefix(f"{path}: ")
                _log.warning(
                    "the update of %s in round %d is lost: %s; the site is asked for it again",
                    site,
                    round_.number,
                    what,
                    extra=about(site=site, round=round_.number),
                )
                set_aside(path, self._updates.parent)
                continue
            round_.received(
                site,
                Stored(path, digest, received.bytes),
                cases=received.cases,
                download=received.download,
                work=received.work,
                upload=received.upload,
                epsilon=received.epsilon,
                arrived=call.started,
            )

    def _outdated(self, site: str, received: Received, first_answered: Mapping[str, int]) -> bool:
        """Whether the site must do the round once more, as what it keeps to itself is of an earlier round by now."""
        if self._host.study.training.personal == "none" or self._call.round.kind is not Kind.TRAIN:
            return False
        return received.outdated or first_answered.get(site, self._call.round.number) < self._call.round.number

    async def _until_closed(self) -> None:
        call, host = self._call, self._host
        while True:
            if call.failure is not None:
                raise call.failure
            if call.round.complete:
                break
            if call.round.kind is Kind.TRAIN:
                check_budgets(call.round)
            try:
                async with asyncio.timeout(max(0.0, call.deadline - time.monotonic())):
                    await call.change()
            except TimeoutError:
                if call.round.deadline():
                    break
                call.deadline = time.monotonic() + host.study.cohort.deadline_seconds
                answered = f"{len(call.round.included)} of the quorum of {call.round.needed} answered"
                host.retried(call, call.round.missing, f"{answered} before the deadline")
        host.close(call)

    async def _sum(self) -> list[Any]:
        """The report over all included updates, accumulated in name order as far as they are in."""
        call, plan = self._call, self._call.plan
        total = await asyncio.to_thread(plan.zero)
        for site in call.round.sites:
            while call.round.answers[site].update is None and not call.round.closed:
                await call.change()
            stored = call.round.answers[site].update
            if stored is not None:
                await asyncio.to_thread(_accumulate, plan, total, stored)
        while not call.round.closed:
            await call.change()
        return await asyncio.to_thread(plan.report, *total)


def _accumulate(plan: RoundPlan, total: list[Any], stored: Stored) -> None:
    try:
        plan.accumulate(total, TensorFile(stored.path, plan.sent))
    except WireError as error:
        raise TrainingError(
            f"{stored.path}: a received update is damaged on this disk ({error}); check the disk and start "
            "the coordinator "
            "again with the same command: the site is asked for it again"
        ) from error
    release_memory()
