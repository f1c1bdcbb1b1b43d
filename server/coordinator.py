"""The coordinator of one study: compiles it, listens, runs the program, publishes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import gc
import hashlib
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
from common.security.audit import Audit, AuditLog
from common.security.certificates import load_identity
from common.security.revocation import Revoked
from common.security.signing import Signer
from common.study import Study
from common.version import VERSION
from common.wire.channel import parse_address
from common.wire.partial import disk_hit
from common.wire.tensors import Array
from server.access import Access
from server.journal import Journal, read_history
from server.kept import check_kept, kept
from server.replay import RunHistory
from server.results import Evaluated, coordinators_signer, open_holdout, publish_study
from server.run_folder import COORDINATOR, RunFolder, storing
from server.serving import bind, serve
from server.status import last_round
from server.tables import RoundTable, SiteLedger, Table
from server.versions import is_version

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
        run.sweep()
        if _is_over(run):
            _log.info("study %s is complete already; its figures are in %s", study.name, run.report)
            code = 0
        else:
            code = asyncio.run(_run(study, run, setup))
    # Not under the lock: a run that is only served may be published from, and nobody coordinates it.
    return asyncio.run(serve(study, run, setup.listen, setup.identity)) if setup.serve and code == 0 else code


def _is_over(run: RunFolder) -> bool:
    """Whether the study ended here; a coordinator that was killed just then could not say so in the status."""
    if run.is_finished():
        return True
    version = read_history(run.journal).published if run.report.exists() else ""
    if not version or not is_version(run.published / version):  # moved away, as by `wardround repair`: publish again
        return False
    with contextlib.suppress(RunFolderError):
        status = run.read_status()
        run.write_status({**status, "state": "finished", "error": "", "published": str(run.published / version)})
    return True


async def _run(study: Study, run: RunFolder, setup: Setup) -> int:
    from server.status_writer import StatusWriter

    status = StatusWriter(run, study)
    writing = asyncio.create_task(status.run())
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unheard)
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, main.cancel)
    server = journal = audit = None
    watching = contextlib.ExitStack()
    try:
        address = parse_address(setup.listen)
        identity = load_identity(setup.identity)
        access = Access.of(setup.identity, identity.authority)
        server, port = bind(address, identity, access)
        status.set(certificate_expires=identity.not_after.timestamp())
        status.access = access
        status.set(address=f"{address.host}:{port}")
        status.write()
        _log.info("listening on %s port %d", address.host, port)
        journal = Journal(run.journal)
        signer = coordinators_signer(setup.identity)  # before the rounds, which end in what is signed
        audit = AuditLog(run.path, COORDINATOR, signer)
        audit.record("coordinator-started", version=VERSION)
        journal.note("started", version=VERSION)
        access.on_revoked = functools.partial(_shut_out, audit, journal, status)
        watching.enter_context(access.watching())
        return await _coordinate(study, run, server, journal, status, setup, signer, audit)
    except asyncio.CancelledError:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, os._exit, STOPPED)  # whoever asks twice does not want to wait
        status.set(state="stopped", notice=_STOPPED_NOTICE)
        _log.info("%s", _STOPPED_NOTICE)
        with contextlib.suppress(WardroundError):  # it is stopped, whatever the disk says
            if audit is not None:
                audit.record("coordinator-stopped")
            if journal is not None:
                journal.note("stopped")
        await _tell_sites(server, status, "its operator stopped it")
        with contextlib.suppress(WardroundError):
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
        for number in (signal.SIGTERM, signal.SIGINT):  # nothing is left that could be stopped halfway
            loop.add_signal_handler(number, os._exit, STOPPED)
        writing.cancel()
        watching.close()
        await _tell_sites(server, status, "it failed, and its operator has to act first")
        if journal is not None:
            journal.close()
        if audit is not None:
            audit.close()
        with contextlib.suppress(RunFolderError):  # the error that ends the run is the one to show
            status.write()


def _shut_out(audit: Audit, journal: Journal, status: Any, entry: Revoked) -> None:
    """Somebody was revoked: recorded, before the connections are cut, and not waited for in the round under way."""
    member = f"{entry.role} {entry.name}"
    _log.warning("%s was revoked%s", member, f" ({entry.reason})" if entry.reason else "")
    if status.federation is not None:
        status.federation.record("member-shut-out", member=member, reason=entry.reason)
    else:
        audit.record("member-shut-out", member=member, reason=entry.reason)
    journal.note("member-shut-out", member=member, reason=entry.reason)
    if status.federation is not None and entry.role == "site":
        status.federation.give_task(entry.name)
    status.changed()


def _barred(access: Access, site: str) -> str:
    return "its certificate was revoked" if access.revoked("site", site) is not None else ""


def _unheard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """TFF has a task for each part of a round's result: all of them fail with the error that one of them tells."""
    if not isinstance(context.get("exception"), WardroundError):
        loop.default_exception_handler(context)


async def _tell_sites(server: Any, status: Any, reason: str) -> None:
    """Tells the sites that the coordinator goes, unless the study is over, and hangs up; takes about a second."""
    if status.federation is not None and status.federation.finished is None:
        logging.getLogger("grpc").setLevel(logging.CRITICAL)  # that calls are cut off now is no failure to report
        status.federation.pause(reason)
        await status.federation.drained(0.5)
    if server is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await server.stop(grace=0.2)
                await asyncio.sleep(0.1)  # calls that were cut off end by themselves, or gRPC prints how they are ended


async def _coordinate(
    study: Study,
    run: RunFolder,
    server: Any,
    journal: Journal,
    status: Any,
    setup: Setup,
    signer: Signer,
    audit: Audit,
) -> int:
    started = time.monotonic()
    history = journal.history()
    certain = {number: digest for number, digest in history.models.items() if number <= history.saved}
    await asyncio.to_thread(check_kept, run.models, certain)  # those of later rounds are written again
    await asyncio.to_thread(_check_state, run, history)
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

    audit.record(
        "study-gone-on" if history.rounds else "study-started",
        study=study.name,
        study_sha256=hashlib.sha256(study.to_yaml().encode()).hexdigest(),
        plan=plan.digest.hex(),
    )
    audit.sign_head()
    journal.note("plan", digest=plan.digest.hex())

    import tensorflow_federated as tff

    from server.data_source import SiteDataSource
    from server.federation import Federation
    from server.noise import Noise
    from server.program import Learning, Releases, run_study
    from server.service import answer
    from server.state import FileStateManager, ModelReleaseManager

    noise = Noise(study, run.privacy, journal) if study.privacy.unit == "site" else None
    ledger = SiteLedger(run.sites, (lambda: noise.epsilon) if noise is not None else None)
    federation = Federation(
        plan, run.updates, journal, changed=status.changed, round_closed=ledger.record, audit=audit, noise=noise
    )
    if status.access is not None:
        federation.barred = functools.partial(_barred, status.access)
    status.federation = federation
    await answer(server, federation, run.published)
    status.set(state="waiting for sites")

    models = ModelReleaseManager(run.models, record=journal.model)
    learning = Learning(plan.train.process, plan.evaluate.process if plan.evaluate is not None else None)
    sites = study.cohort.sites

    async def saved(number: int, best_round: int, score: float | None) -> None:
        status.set(best={"round": best_round, "validation_dice": score} if score is not None else None)
        await asyncio.to_thread(federation.saved, number)
        await asyncio.to_thread(models.keep_only, [best_round, study.training.rounds], up_to=number)

    releases = Releases(
        metrics=[
            RoundTable(run.rounds),
            _InThread(lambda: tff.program.TensorBoardReleaseManager(run.tensorboard), run.tensorboard),
            _LastRow(status, run, study.training.rounds, evaluated),
        ],
        model=models,
        saved=saved,
    )

    with tff.framework.get_context_stack().install(tff.program.NativeFederatedContext(federation)):
        outcome = await run_study(
            learning,
            training_data=SiteDataSource(sites, plan.train.process.next.type_signature.parameter[1]),
            validation_data=SiteDataSource(sites, plan.evaluate.process.next.type_signature.parameter[1])
            if plan.evaluate is not None
            else None,
            rounds=history.saved if history.ended else study.training.rounds,
            classes=study.task.foreground,
            states=FileStateManager(run.state, recorded=federation.history.states, record=journal.state),
            releases=releases,
            evaluate_holdout=_scalars(evaluated) if evaluated is not None else None,
            annotate=ledger.summary,
            start=start.weights if start is not None else None,
        )
    ended = outcome.ended or history.ended
    if outcome.ended:
        journal.ended(outcome.rounds, outcome.ended)
    if ended:
        _log.warning("the study ends after round %d of %d: %s", outcome.rounds, study.training.rounds, ended)
        status.set(ended={"round": outcome.rounds, "reason": ended})
    journal.note("trained", rounds=outcome.rounds, best_round=outcome.best_round)
    disk_hit("study.trained", run.path)
    federation.finish(f"study {study.name} is complete after {outcome.rounds} rounds" + (f": {ended}" if ended else ""))
    await federation.drained()
    status.set(state="publishing")
    best = outcome.best_round, outcome.best_score
    report = await asyncio.to_thread(
        publish_study, study, run, *best, evaluated, old, start, started, signer=signer, audit=audit
    )
    audit.record("study-ended", rounds=outcome.rounds, version=report["publication"]["version"])
    audit.sign_head()
    journal.note("published", version=report["publication"]["version"])
    with storing(run.pending):
        run.pending.unlink(missing_ok=True)
    status.set(state="finished", published=report["publication"]["folder"])
    _log.info("finished: best round %d, published %s", outcome.best_round, report["publication"]["folder"])
    return 0


def _check_state(run: RunFolder, history: RunHistory) -> None:
    """Raises RunFolderError where the state to go on from is not as it was saved, before the plan takes its time."""
    if not history.saved:
        return
    check_kept(run.state, {history.saved: history.states[history.saved]})
    if history.saved not in kept(run.state):
        raise RunFolderError(
            f"{run.state}: the state after round {history.saved} is gone; `wardround repair --run {run.path} "
            "--dry-run` says where the run can go on, `wardround repair` goes back there"
        )


def _scalars(evaluated: Evaluated) -> Callable[[Sequence[Array]], Awaitable[Mapping[str, Any]]]:
    """Maps weights to the holdout's metrics of them, in a thread.

    Without mirror images, which are for what is published: rounds would take several times as long.
    """

    async def scalars(weights: Sequence[Array]) -> Mapping[str, Any]:
        return (await asyncio.to_thread(evaluated.evaluate, weights, mirror=False)).scalars(each_case=True)

    return scalars


class _InThread:
    """A release manager whose writing would keep the event loop from the sites.

    Parameters
    ----------
    make : makes what writes, at the first release, as that may write too.
    folder : where, for the error.
    """

    def __init__(self, make: Callable[[], Any], folder: Path) -> None:
        self._make = make
        self._manager: Any = None
        self._folder = folder

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics. Raises RunFolderError where they cannot be written."""
        import tensorflow as tf

        def write() -> None:
            self._manager = self._manager or self._make()
            asyncio.run(self._manager.release(value, key))

        try:
            await asyncio.to_thread(write)
        except (OSError, tf.errors.OpError) as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            said = first.rpartition("; ")[2]  # TensorFlow's words end on those of the system
            raise RunFolderError(
                f"{self._folder}: cannot be written ({said}); free space, or make the "
                "disk writable, and start again with the same command: what was finished is kept"
            ) from error


class _LastRow:
    """A release manager that tells status and log of the newest row and writes the holdout's cases to a CSV."""

    def __init__(self, status: Any, run: RunFolder, rounds: int, evaluated: Evaluated | None) -> None:
        self._status = status
        self._rounds = rounds
        self._evaluated = evaluated
        self._cases = Table(run.holdout)

    async def release(self, value: Any, key: int) -> None:
        """Takes one round's metrics."""
        holdout = value.get("holdout", {})
        last = {
            "round": key,
            "train_loss": float(value["train"]["loss"]) if "loss" in value["train"] else None,
            "validation_dice": value.get("validation", {}).get("dice"),
            "holdout_dice": json_ready(holdout.get("dice")),
            "seconds": value.get("seconds"),
        } | ({"epsilon": value["epsilon"]} if "epsilon" in value else {})
        _log.info("%s", last_round({"last": last, "rounds": self._rounds}))
        self._status.set(last=last)
        if self._evaluated is not None and self._evaluated.latest is not None:
            rows = [collections.OrderedDict(round=key, **dict(row)) for row in self._evaluated.latest.rows()]
            await asyncio.to_thread(self._cases.write, key, rows)
