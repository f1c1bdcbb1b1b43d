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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import STOPPED
from common.errors import RunFolderError, UsageError, WardroundError
from common.export.figures import json_ready
from common.learning.runtime import configure_tensorflow, keep_little_memory, release_memory
from common.secure_aggregation.session import small_cohort_warning
from common.security.audit import Audit, AuditLog
from common.security.certificates import load_identity
from common.security.revocation import Revoked
from common.security.secure_signatures import EnrolledSites, nobody_revoked
from common.security.signing import Signer
from common.study import Study
from common.version import VERSION
from common.watching.logs import about, keep_log
from common.wire.channel import parse_address
from common.wire.partial import disk_hit
from common.wire.tensors import Array
from server.access import Access
from server.journal import Journal, read_history
from server.kept import check_kept, kept
from server.operation import OperationService, add_operation
from server.publisher import Publisher
from server.replay import RunHistory
from server.results import Evaluated, coordinators_signer, open_holdout, publish_study
from server.run_folder import COORDINATOR, RunFolder, storing
from server.serving import bind, denied, serve
from server.starting import TrustOf, signed
from server.status import last_round
from server.tables import RoundTable, SiteLedger, Table
from server.timings import ROUND_PARTS
from server.versions import is_version
from server.watching.log_reader import LOG
from server.watching.samples import Sampler
from server.watching.watch import Watch, Watching

if TYPE_CHECKING:
    from common.learning.plan import StudyPlan
    from server.starting import Start

_log = logging.getLogger("wardround.coordinator")
_LAST_WORDS_SECONDS = 1.0  # for whoever watches a coordinator that is asked to stop
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
    trust : whose signature a version must have that the study starts from.
    serve : whether sites may fetch what is published after the study's end, until somebody stops the coordinator.
    watching : how it is watched while it runs.
    """

    listen: str
    identity: Path
    holdout: Path | None = None
    old_holdout: Path | None = None
    serve: bool = False
    watching: Watching = field(default_factory=Watching)
    trust: TrustOf = signed


def run(study: Study, run: RunFolder, setup: Setup) -> int:
    """Coordinate the study to its end, from where the run folder stands. Returns the exit code.

    Raises
    ------
    WardroundError : each kind with its own exit code; `status.json` then holds the message too.
    """
    if setup.old_holdout is not None and study.training.start_from is None:
        raise UsageError("--old-holdout: only for a study that starts from a published model (training.start_from)")
    run.prepare(study)
    with contextlib.ExitStack() as stack:
        with run.locked():
            run.sweep()
            stack.callback(keep_log(run.path / LOG, context=lambda record: {"study": study.name}))
            watch = Watch(run, study.name, setup.watching)
            stack.callback(watch.close)
            if _is_over(run):
                _log.info("study %s is complete already; its figures are in %s", study.name, run.report)
                watch.begin()
                code = 0
            else:
                code = asyncio.run(_run(study, run, setup, watch))
        # Not under the lock: a run that is only served may be published from, and nobody coordinates it.
        if not setup.serve or code != 0:
            return code
        places = setup.identity, setup.holdout, setup.old_holdout
        return asyncio.run(serve(study, run, setup.listen, setup.identity, Publisher(run, *places)))


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


async def _run(study: Study, run: RunFolder, setup: Setup, watch: Watch) -> int:
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
    publisher = Publisher(run, setup.identity, setup.holdout, setup.old_holdout)
    watching.callback(publisher.stop)
    try:
        address = parse_address(setup.listen)
        identity = load_identity(setup.identity)
        access = Access.of(setup.identity, identity.authority)
        server, port = bind(address, identity, access)
        status.set(certificate_expires=identity.not_after.timestamp())
        status.access = access
        status.set(address=f"{address.host}:{port}")
        status.write()
        watch.begin()
        _log.info("listening on %s port %d", address.host, port)
        journal = Journal(run.journal)
        signer = coordinators_signer(setup.identity)  # before the rounds, which end in what is signed
        audit = AuditLog(run.path, COORDINATOR, signer)
        audit.record("coordinator-started", version=VERSION)
        journal.note("started", version=VERSION)
        access.on_revoked = functools.partial(_shut_out, audit, journal, status)
        access.on_denied = functools.partial(denied, audit)
        watching.enter_context(access.watching())
        add_operation(server, OperationService(run, publisher, audit.record, main.cancel))
        return await _coordinate(study, run, server, journal, status, setup, signer, audit, publisher)
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
        publisher.stop()
        await asyncio.to_thread(watch.close, _LAST_WORDS_SECONDS)
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
    who = about(site=entry.name) if entry.role == "site" else None
    _log.warning("%s was revoked%s", member, f" ({entry.reason})" if entry.reason else "", extra=who)
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
    publisher: Publisher,
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

        start = starting_weights(study, run, build_network(study), setup.trust)
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
    from server.releases import InThread, SamplePictures
    from server.secure_rounds import SecureSums
    from server.service import answer
    from server.state import FileStateManager, ModelReleaseManager

    noise = Noise(study, run.privacy, journal) if study.privacy.unit == "site" else None
    ledger = SiteLedger(run.sites, (lambda: noise.epsilon) if noise is not None else None)
    secure = None
    if study.secure_aggregation.required:
        own = load_identity(setup.identity)
        list_of_revoked = status.access.newest if status.access is not None else nobody_revoked
        secure = SecureSums(EnrolledSites(own.authority, list_of_revoked), own.run)
        if warning := small_cohort_warning(len(study.cohort.sites)):
            _log.warning("%s", warning)
    federation = Federation(
        plan,
        run.updates,
        journal,
        changed=status.changed,
        round_closed=ledger.record,
        audit=audit,
        noise=noise,
        secure=secure,
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
        wanted = [best_round, study.training.rounds, *publisher.held]
        await asyncio.to_thread(models.keep_only, wanted, up_to=number)

    sampler = pictures = None
    if evaluated is not None:
        holdout = evaluated.holdout
        sampler = Sampler(holdout.cases, holdout.sites, planar=study.task.dimensions == 2)
        pictures = SamplePictures(run, study.task.classes, sampler, evaluated)
    releases = Releases(
        metrics=[
            RoundTable(run.rounds),
            InThread(lambda: tff.program.TensorBoardReleaseManager(run.tensorboard), run.tensorboard),
            _LastRow(status, run, study.training.rounds, evaluated),
            *([pictures] if pictures is not None else []),
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
            evaluate_holdout=_scalars(evaluated, sampler) if evaluated is not None else None,
            annotate=ledger.summary,
            start=start.weights if start is not None else None,
        )
    if pictures is not None:
        await pictures.close()
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
    async with publisher.alone():
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


def _scalars(
    evaluated: Evaluated, sampler: Sampler | None
) -> Callable[[Sequence[Array]], Awaitable[Mapping[str, Any]]]:
    """Maps weights to the holdout's metrics of them, in a thread.

    Without mirror images, which are for what is published: rounds would take several times as long.
    """

    async def scalars(weights: Sequence[Array]) -> Mapping[str, Any]:
        found = await asyncio.to_thread(evaluated.evaluate, weights, mirror=False, sampler=sampler)
        return found.scalars(each_case=True)

    return scalars


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
            "train_loss": float(value["train"]["loss"]) if "loss" in value.get("train", {}) else None,
            "validation_dice": value.get("validation", {}).get("dice"),
            "holdout_dice": json_ready(holdout.get("dice")),
            "seconds": value.get("seconds"),
            "timings": {part: value[f"seconds_{part}"] for part in ROUND_PARTS if f"seconds_{part}" in value},
            "slowest_site": value.get("slowest_site"),
        } | ({"epsilon": value["epsilon"]} if "epsilon" in value else {})
        _log.info("%s", last_round({"last": last, "rounds": self._rounds}), extra=about(event="round-done", round=key))
        self._status.set(last=last)
        if holdout and self._evaluated is not None and self._evaluated.latest is not None:
            rows = [collections.OrderedDict(round=key, **dict(row)) for row in self._evaluated.latest.rows()]
            await asyncio.to_thread(self._cases.write, key, rows)
