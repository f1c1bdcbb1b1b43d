"""The coordinator of one study: compiles it, listens, runs the program, publishes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import csv
import gc
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import STOPPED
from common.errors import RunFolderError, UsageError, WardroundError
from common.export.figures import json_ready
from common.learning.runtime import configure_tensorflow, keep_little_memory, release_memory
from common.security.certificates import load_identity
from common.study import Study
from common.wire.channel import parse_address
from common.wire.tensors import Array
from server.results import Evaluated, open_holdout, publish_round
from server.run_folder import RunFolder, write_atomically
from server.serving import bind, serve
from server.status import last_round

if TYPE_CHECKING:
    from common.learning.plan import StudyPlan
    from server.starting import Start

_log = logging.getLogger("wardround.coordinator")
_STOPPED_NOTICE = "the coordinator was stopped; start it again with the same command to go on"


@dataclass(frozen=True)
class Setup:
    """How a coordinator was started.

    Attributes
    ----------
    listen : the address to serve, host:port.
    identity : the folder of its certificate and key.
    holdout, old_holdout : labelled images of its own, and those by which the study was judged that this one starts
        from.
    serve : whether sites may fetch what is published after the study's end, until somebody stops the coordinator.
    """

    listen: str
    identity: Path
    holdout: Path | None = None
    old_holdout: Path | None = None
    serve: bool = False


def run(study: Study, run: RunFolder, setup: Setup) -> int:
    """Coordinate the study to its end, from where the run folder stands. Returns the exit code.

    Raises
    ------
    WardroundError : each kind with its own exit code; `status.json` then holds the message too.
    """
    if setup.old_holdout is not None and study.training.start_from is None:
        raise UsageError("--old-holdout: only for a study that starts from a published model (training.start_from)")
    run.prepare(study)
    with run.locked():
        if run.is_finished():
            _log.info("study %s is complete already; its figures are in %s", study.name, run.report)
            code = 0
        else:
            code = asyncio.run(_run(study, run, setup))
    # Not under the lock: a run that is only served may be published from, and nobody coordinates it.
    return asyncio.run(serve(study, run, setup.listen, setup.identity)) if setup.serve and code == 0 else code


async def _run(study: Study, run: RunFolder, setup: Setup) -> int:
    from server.status_writer import StatusWriter

    status = StatusWriter(run, study)
    writing = asyncio.create_task(status.run())
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, main.cancel)
    server = None
    try:
        address = parse_address(setup.listen)
        server, port = bind(address, load_identity(setup.identity))
        status.set(address=f"{address.host}:{port}")
        status.write()
        _log.info("listening on %s port %d", address.host, port)
        return await _coordinate(study, run, server, status, setup)
    except asyncio.CancelledError:
        status.set(state="stopped", notice=_STOPPED_NOTICE)
        _log.info("%s", _STOPPED_NOTICE)
        if server is not None:
            await server.stop(grace=0.2)
        status.write()
        # Compiling, evaluating or publishing may go on for minutes in a thread that cannot be interrupted. Everything
        # that it writes is put in place whole or not at all, so the process may end here.
        logging.shutdown()
        os._exit(STOPPED)
    except WardroundError as error:
        status.set(state="failed", error=str(error))
        raise
    except BaseException as error:
        status.set(state="failed", error=f"internal error ({type(error).__name__})")
        raise
    finally:
        writing.cancel()
        if server is not None:
            await server.stop(grace=0.2)
        with contextlib.suppress(RunFolderError):  # the error that ends the run is the one to show
            status.write()


async def _coordinate(study: Study, run: RunFolder, server: Any, status: Any, setup: Setup) -> int:
    started = time.monotonic()
    evaluated = await asyncio.to_thread(open_holdout, study, setup.holdout)
    old = await asyncio.to_thread(open_holdout, study, setup.old_holdout, "--old-holdout")

    def load() -> tuple[StudyPlan, Start | None]:
        keep_little_memory()
        configure_tensorflow(study.training.threads)
        from common.learning.plan import build_plan
        from common.models import build_network
        from server.starting import starting_weights

        start = starting_weights(study, run, build_network(study))
        plan = build_plan(study)
        gc.collect()  # compiling leaves cycles behind, at 31M weights a fifth of a coordinator's memory
        release_memory()
        return plan, start

    plan, start = await asyncio.to_thread(load)
    _log.info("plan %s compiled in %.1f s", plan.digest.hex()[:16], time.monotonic() - started)

    import tensorflow_federated as tff

    from server.data_source import SiteDataSource
    from server.federation import Federation
    from server.journal import Journal
    from server.program import Learning, Releases, run_study
    from server.service import answer
    from server.state import FileStateManager, ModelReleaseManager

    journal = Journal(run.journal)
    ledger = SiteLedger(run.sites)
    federation = Federation(plan, run.updates, journal, changed=status.changed, round_closed=ledger.record)
    status.federation = federation
    await answer(server, federation, run.published)
    status.set(state="waiting for sites")

    models = ModelReleaseManager(run.models)
    learning = Learning(plan.train.process, plan.evaluate.process if plan.evaluate is not None else None)
    sites = study.cohort.sites

    def best_changed(best_round: int, score: float | None) -> None:
        models.keep_only([best_round, study.training.rounds])
        status.set(best={"round": best_round, "validation_dice": score} if score is not None else None)

    releases = Releases(
        metrics=[
            tff.program.CSVFileReleaseManager(run.rounds, key_fieldname="round"),
            _InThread(tff.program.TensorBoardReleaseManager(run.tensorboard)),
            _LastRow(status, run, study.training.rounds, evaluated),
        ],
        model=models,
        best_changed=best_changed,
    )

    with tff.framework.get_context_stack().install(tff.program.NativeFederatedContext(federation)):
        outcome = await run_study(
            learning,
            training_data=SiteDataSource(sites, plan.train.process.next.type_signature.parameter[1]),
            validation_data=SiteDataSource(sites, plan.evaluate.process.next.type_signature.parameter[1])
            if plan.evaluate is not None
            else None,
            rounds=study.training.rounds,
            classes=study.task.foreground,
            states=FileStateManager(run.state),
            releases=releases,
            evaluate_holdout=_scalars(evaluated) if evaluated is not None else None,
            annotate=ledger.summary,
            start=start.weights if start is not None else None,
        )
    journal.note("trained", rounds=outcome.rounds, best_round=outcome.best_round)
    federation.finish(f"study {study.name} is complete after {outcome.rounds} rounds")
    await federation.drained()
    status.set(state="publishing")
    report = await asyncio.to_thread(
        publish_round, study, run, outcome.best_round, outcome.best_score, evaluated, old, start, started
    )
    write_atomically(run.report, json.dumps(report, indent=1))
    journal.note("published", version=report["publication"]["version"])
    journal.close()
    status.set(state="finished", published=report["publication"]["folder"])
    _log.info("finished: best round %d, published %s", outcome.best_round, report["publication"]["folder"])
    return 0


def _scalars(evaluated: Evaluated) -> Callable[[Sequence[Array]], Awaitable[Mapping[str, Any]]]:
    """Maps weights to the holdout's metrics of them, in a thread."""

    async def scalars(weights: Sequence[Array]) -> Mapping[str, Any]:
        return (await asyncio.to_thread(evaluated.evaluate, weights)).scalars(each_case=True)

    return scalars


class _InThread:
    """A release manager whose writing would keep the event loop from the sites."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics."""
        await asyncio.to_thread(asyncio.run, self._manager.release(value, key))


class _LastRow:
    """A release manager that tells status and log of the newest row and writes the holdout's cases to a CSV."""

    def __init__(self, status: Any, run: RunFolder, rounds: int, evaluated: Evaluated | None) -> None:
        self._status = status
        self._run = run
        self._rounds = rounds
        self._evaluated = evaluated
        self._first = True  # after a start, rows of a round that was cut off may be there

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics."""
        holdout = value.get("holdout", {})
        last = {
            "round": key,
            "train_loss": float(value["train"]["loss"]),
            "validation_dice": value.get("validation", {}).get("dice"),
            "holdout_dice": json_ready(holdout.get("dice")),
            "seconds": value.get("seconds"),
        }
        _log.info("%s", last_round({"last": last, "rounds": self._rounds}))
        self._status.set(last=last)
        if self._evaluated is not None and self._evaluated.latest is not None:
            rows = [collections.OrderedDict(round=key, **dict(row)) for row in self._evaluated.latest.rows()]
            await asyncio.to_thread(append_csv, self._run.holdout, rows, key if self._first else None)
            self._first = False


class SiteLedger:
    """`sites.csv`, a row a round and site, and what `rounds.csv` says of the cohort."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._continued = path.exists()
        self._summaries: dict[int, Mapping[str, Any]] = {}

    def record(self, call: Any) -> None:
        """A closed round."""
        round_ = call.round
        seconds = time.monotonic() - call.started
        if round_.kind.value == "train":
            self._summaries[round_.number] = collections.OrderedDict(
                sites=len(round_.included), attempt=round_.attempt, seconds=round(seconds, 3)
            )
        rows = [
            collections.OrderedDict(
                round=round_.number,
                kind=round_.kind.value,
                site=site,
                attempt=round_.attempt,
                outcome="included" if answer.update is not None else ("failed" if answer.reason else "missing"),
                reason=answer.reason,
                cases=answer.cases,
                bytes_down=call.bytes_down.get(site, 0),
                bytes_up=answer.update.size if answer.update is not None else 0,
                seconds_download=round(answer.seconds_download, 3),
                seconds_work=round(answer.seconds_work, 3),
                seconds_upload=round(answer.seconds_upload, 3),
                seconds_round=round(seconds, 3),
            )
            for site, answer in round_.answers.items()
        ]
        append_csv(self._path, rows, round_.number if self._continued else None)
        self._continued = False

    def summary(self, number: int) -> Mapping[str, Any]:
        """The first columns of the round's row in `rounds.csv`."""
        return self._summaries.get(number, {})


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]], drop_from_round: int | None = None) -> None:
    """Appends rows of equal columns; first drops those of `drop_from_round` and later, of a run that was cut off."""
    existing: list[dict[str, Any]] = []
    if path.exists() and drop_from_round is not None:
        with path.open(newline="") as file:
            existing = list(csv.DictReader(file))
        kept = [row for row in existing if int(row["round"]) < drop_from_round]
        if len(kept) != len(existing):
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            append_csv(partial, kept)
            if kept:
                partial.replace(path)
            else:
                path.unlink()
    if not rows:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
