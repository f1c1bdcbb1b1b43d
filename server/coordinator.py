"""The coordinator of one study: compiles it, listens, runs the program, publishes; also for finished runs."""

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
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from common.cli import STOPPED
from common.errors import DataError, NetworkError, RunFolderError, UsageError, WardroundError
from common.learning.runtime import configure_tensorflow, keep_little_memory, release_memory
from common.security.certificates import Identity, load_identity
from common.study import Study
from common.wire.channel import SERVER_OPTIONS, Address, parse_address, server_credentials
from common.wire.tensors import Array, TensorSpec
from server.run_folder import RunFolder, write_atomically
from server.status import last_round

if TYPE_CHECKING:
    from server.evaluation import ForwardPass, Holdout, HoldoutResult

_log = logging.getLogger("wardround.coordinator")
_STOPPED_NOTICE = "the coordinator was stopped; start it again with the same command to go on"


def run(study: Study, run: RunFolder, *, listen: str, identity: Path, holdout: Path | None) -> int:
    """Coordinate the study to its end, from where the run folder stands. Returns the exit code.

    Raises
    ------
    WardroundError : each kind with its own exit code; `status.json` then holds the message too.
    """
    run.prepare(study)
    with run.locked():
        if run.is_finished():
            _log.info("study %s is complete already; its figures are in %s", study.name, run.report)
            return 0
        return asyncio.run(_run(study, run, listen=listen, identity=identity, holdout=holdout))


async def _run(study: Study, run: RunFolder, *, listen: str, identity: Path, holdout: Path | None) -> int:
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
        server, port = _bind(parse_address(listen), load_identity(identity))
        status.set(address=f"{parse_address(listen).host}:{port}")
        status.write()
        _log.info("listening on %s port %d", parse_address(listen).host, port)
        return await _coordinate(study, run, server, status, holdout)
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


def _bind(address: Address, identity: Identity) -> tuple[grpc.aio.Server, int]:
    """A server that holds the address but does not answer yet; returns it and its port. Loads no TensorFlow.

    Raises
    ------
    NetworkError : the port is in use or not allowed.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    try:
        port = server.add_secure_port(str(address), server_credentials(identity))
    except RuntimeError as error:
        raise NetworkError(
            f"{address}: cannot listen there; the port may be in use. Choose another with --listen, or stop "
            "the program "
            f"that holds it (`ss -ltnp 'sport = :{address.port}'` names it)"
        ) from error
    return server, port


async def _coordinate(study: Study, run: RunFolder, server: Any, status: Any, holdout: Path | None) -> int:
    started = time.monotonic()
    evaluated = await asyncio.to_thread(_open_holdout, study, holdout)

    def load() -> Any:
        keep_little_memory()
        configure_tensorflow(study.training.threads)
        from common.learning.plan import build_plan

        plan = build_plan(study)
        gc.collect()  # compiling leaves cycles behind, at 31M weights a fifth of a coordinator's memory
        release_memory()
        return plan

    plan = await asyncio.to_thread(load)
    _log.info("plan %s compiled in %.1f s", plan.digest.hex()[:16], time.monotonic() - started)

    import tensorflow_federated as tff

    from server.data_source import SiteDataSource
    from server.federation import Federation
    from server.journal import Journal
    from server.program import Learning, Releases, run_study
    from server.service import start
    from server.state import FileStateManager, ModelReleaseManager

    journal = Journal(run.journal)
    ledger = SiteLedger(run.sites)
    federation = Federation(plan, run.updates, journal, changed=status.changed, round_closed=ledger.record)
    status.federation = federation
    await start(server, federation)
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
            evaluate_holdout=evaluated.scalars if evaluated is not None else None,
            annotate=ledger.summary,
        )
    journal.note("trained", rounds=outcome.rounds, best_round=outcome.best_round)
    federation.finish(f"study {study.name} is complete after {outcome.rounds} rounds")
    await federation.drained()
    status.set(state="publishing")
    report = await asyncio.to_thread(_report, study, run, outcome.best_round, outcome.best_score, evaluated, started)
    write_atomically(run.report, json.dumps(report, indent=1))
    journal.note("published", version=report["publication"]["version"])
    journal.close()
    status.set(state="finished", published=report["publication"]["folder"])
    _log.info("finished: best round %d, published %s", outcome.best_round, report["publication"]["folder"])
    return 0


class _Evaluated:
    """The holdout and the network's forward pass over it, in TensorFlow, on all cores."""

    def __init__(self, study: Study, holdout: Holdout) -> None:
        self._study = study
        self.holdout = holdout
        self.latest: HoldoutResult | None = None

    @cached_property
    def _forward(self) -> ForwardPass:
        from common.models import build_network
        from server.evaluation import ForwardPass

        return ForwardPass(self._study, build_network(self._study))

    def evaluate(self, weights: Sequence[Array]) -> HoldoutResult:
        """The holdout result of these weights."""
        predict = self._forward.with_weights(weights)
        self.latest = self.holdout.evaluate(predict, tile=self._study.publishing.tile, threads=os.cpu_count() or 1)
        return self.latest

    async def scalars(self, weights: Sequence[Array]) -> Mapping[str, Any]:
        """The holdout's metrics of these weights."""
        return (await asyncio.to_thread(self.evaluate, weights)).scalars(each_case=True)


def _open_holdout(study: Study, folder: Path | None) -> _Evaluated | None:
    if folder is None or not study.evaluation.holdout:
        return None
    from server.evaluation import Holdout

    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; give the coordinator's own labelled images with --holdout, or leave it out"
        )
    return _Evaluated(study, Holdout(study, folder))


class _InThread:
    """A release manager whose writing would keep the event loop from the sites."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics."""
        await asyncio.to_thread(asyncio.run, self._manager.release(value, key))


class _LastRow:
    """A release manager that tells status and log of the newest row and writes the holdout's cases to a CSV."""

    def __init__(self, status: Any, run: RunFolder, rounds: int, evaluated: _Evaluated | None) -> None:
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
            "holdout_dice": _finite(holdout.get("dice")),
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


def _report(
    study: Study,
    run: RunFolder,
    best_round: int,
    score: float | None,
    evaluated: _Evaluated | None,
    started: float | None,
) -> dict[str, Any]:
    """Evaluates and publishes one round's weights; returns the report, where `best_round` is that round."""
    from server.publishing import publish as publish_files

    weights = _weights(study, run, best_round)
    result = evaluated.evaluate(weights) if evaluated is not None else None
    holdout = evaluated.holdout if evaluated is not None else None
    details = {"round": best_round, "rounds": study.training.rounds, "validation_dice": score}
    version = _next_version(run.published)
    publication = publish_files(study, weights, holdout, run.published / version, details=details, progress=_log.info)
    report = {
        "study": study.name,
        "rounds": study.training.rounds,
        "best_round": best_round,
        "validation_dice": score,
        "holdout": _finite(result.scalars()) if result is not None else None,
        "publication": {**publication, "version": version, "folder": str(run.published / version)},
        "seconds": round(time.monotonic() - started, 1) if started is not None else None,
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def _weights(study: Study, run: RunFolder, round_number: int) -> list[Array]:
    from common.models import build_network
    from server.state import load_weights

    specs = [TensorSpec("float32", spec.shape) for spec in build_network(study).specs]
    return load_weights(run.models, round_number, specs)


def _next_version(folder: Path) -> str:
    numbers = [int(path.name[1:]) for path in folder.glob("v*") if path.name[1:].isdigit()]
    return f"v{max(numbers, default=0) + 1}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that does not exist is null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def _chosen_round(study: Study, run: RunFolder, round_number: int | None) -> tuple[int, float | None]:
    """The round asked for, or the best one that status knows, or the last kept; and its validation Dice, if any."""
    if round_number is not None:
        return round_number, _validation_dice(run, round_number)
    best = run.read_status().get("best")
    if best:
        return int(best["round"]), best["validation_dice"]
    kept = sorted(int(path.stem) for path in run.models.glob("*.tensors") if path.stem.isdigit())
    if not kept:
        raise RunFolderError(f"{run.path}: no round's model was kept yet; wait for the end of a round")
    return kept[-1], _validation_dice(run, kept[-1])


def _validation_dice(run: RunFolder, round_number: int) -> float | None:
    """What `rounds.csv` says of the round; None where the sites did not validate or the round has no row."""
    if not run.rounds.exists():
        return None
    with run.rounds.open(newline="") as file:
        found = [row.get("validation/dice") for row in csv.DictReader(file) if row["round"] == str(round_number)]
    return _finite(float(found[-1])) if found and found[-1] else None


def evaluate(run: RunFolder, holdout: Path, round_number: int | None) -> dict[str, Any]:
    """Holdout metrics of a kept round of this run: {"round", "holdout"}."""
    study = run.read_study()
    chosen, score = _chosen_round(study, run, round_number)
    opened = _required_holdout(study, holdout)
    configure_tensorflow(study.training.threads)
    result = opened.evaluate(_weights(study, run, chosen))
    return {"round": chosen, "validation_dice": score, "holdout": _finite(result.scalars())}


def publish(run: RunFolder, holdout: Path | None, round_number: int | None) -> dict[str, Any]:
    """Publishes a kept round of this run as a new version; returns the report."""
    study = run.read_study()
    chosen, score = _chosen_round(study, run, round_number)
    opened = _open_holdout(study, holdout)
    configure_tensorflow(study.training.threads)
    report = _report(study, run, chosen, score, opened, None)
    if not run.report.exists():  # the study's own final figures stay as they are
        write_atomically(run.report, json.dumps(report, indent=1))
    return report


def _required_holdout(study: Study, folder: Path) -> _Evaluated:
    opened = _open_holdout(study, folder)
    if opened is None:
        raise UsageError("evaluation.holdout is false in this study; there is nothing to evaluate on")
    return opened
