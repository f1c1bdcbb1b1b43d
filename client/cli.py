"""The `wardround-site` command: the hospital's side."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.approval_cli import add_approval_commands
from client.audit_cli import add_audit_commands
from client.command_line import CommandParser
from client.data_cli import add_data_commands
from client.identity_cli import add_identity_commands
from client.model_cli import add_model_commands
from client.places import Place, add_policy_option, command_text, default_work, places, policy_path
from client.predict_cli import add_predict_command
from client.site_log import NamesSite, works_for
from client.site_page.command import add_page_command
from client.site_status import SiteStatus, read_status, status_text
from common.cli import exit_codes_epilog, run_command
from common.errors import UsageError
from common.study import Study, load_study
from common.version import VERSION
from common.watching.logs import FORMATS, Context, set_up_logs
from common.wording import printable

if TYPE_CHECKING:
    from client.datasets import SiteDataset
    from client.gate import Passed, SiteGate
    from client.secure_task import SecureTask
    from common.learning.plan import StudyPlan
    from common.security.audit import Audit
    from common.security.certificates import Identity

CACHE_GB = 20.0
_SIGNAL_SECONDS = 0.2  # at most so late a signal is noticed


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = CommandParser(
        prog="wardround-site",
        description="The hospital's side of a Wardround study: it dials out, trains here, sends updates; images stay.",
        epilog=exit_codes_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wardround-site {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    start = commands.add_parser(
        "start", help="take part in a study until it is over", description="Takes part in a study that was approved."
    )
    start.add_argument("study", type=Path, metavar="STUDY", help="the coordinator's study file")
    start.add_argument("--site", action="append", required=True, help="this site's name, as in the study")
    start.add_argument(
        "--data", action="append", required=True, metavar="NAME|FOLDER",
        help="registered data sets (several separated by commas), or a folder of cases",
    )  # fmt: skip
    start.add_argument("--registry", type=Path, metavar="FILE", help="where data sets are registered, as for `data`")
    start.add_argument(
        "--cache-gb", type=_gigabytes, default=CACHE_GB, metavar="GB",
        help=f"how much disk prepared cases may take in the --work folder (default: {CACHE_GB}; 0 keeps none)",
    )  # fmt: skip
    start.add_argument(
        "--identity", action="append", type=Path, required=True, help="folder with this site's certificate"
    )
    start.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="where to dial")
    start.add_argument(
        "--work", action="append", type=Path, help="folder for this site's own files (default: wardround-SITE)"
    )
    add_policy_option(start)
    start.add_argument(
        "--epsilon-ceiling",
        type=_positive,
        metavar="E",
        help="the most privacy that all studies of a work folder may spend together, whatever their own budgets "
        "(patient-level privacy; default: each study's budget alone)",
    )
    start.add_argument(
        "--metrics", metavar="[HOST:]PORT",
        help="serve Prometheus metrics, /healthz and /readyz there, on loopback without HOST; there are no passwords",
    )  # fmt: skip
    start.add_argument(
        "--log-format", choices=FORMATS, default="text", help="of what the site says (default: %(default)s)"
    )
    start.set_defaults(handler=_start)

    add_identity_commands(commands)
    add_approval_commands(commands)
    add_data_commands(commands)
    add_model_commands(commands)
    add_predict_command(commands)
    add_audit_commands(commands)
    add_page_command(commands)

    status = commands.add_parser("status", help="what this site is doing")
    status.add_argument("--work", type=Path, required=True, help="the --work folder the site was started with")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(handler=_status)

    options = parser.parse_args(arguments)
    return run_command(lambda: options.handler(options))


def _start(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the agent says itself why it has no connection
    from common.learning.runtime import configure_tensorflow
    from common.security.audit import AuditLog
    from common.security.certificates import load_identity
    from common.security.signing import signer_in
    from common.wire.channel import parse_address

    study = load_study(options.study)
    for site in options.site:
        if site not in study.cohort.sites:
            raise UsageError(
                f"--site {site}: not in the study's cohort ({', '.join(study.cohort.sites)}); correct the name"
            )
    address = parse_address(options.coordinator)
    here = places(options)
    works = [place.work or default_work(place.site) for place in here]
    identities = [load_identity(folder) for folder in options.identity]
    gates = [_gate(options, study, place, work, address.host) for place, work in zip(here, works, strict=True)]
    set_up_logs(options.log_format, stream=sys.stdout, logger="", context=_log_context(study, options.site))
    passed: list[Passed] = []
    with contextlib.ExitStack() as stack:
        statuses = [
            stack.enter_context(SiteStatus(work, study.name, site))
            for site, work in zip(options.site, works, strict=True)
        ]
        for status, identity, folder in zip(statuses, identities, options.identity, strict=True):
            status({"identity": str(folder), "certificate_expires": identity.not_after.timestamp()})
        if options.metrics is not None:
            from client.metrics import serve_metrics

            stack.callback(serve_metrics(options.metrics, works).close)
        for gate, site, folder, work in zip(gates, options.site, options.identity, works, strict=True):
            with _refusal_recorded(study, site, folder, work):
                passed.append(gate.check())
        for status in statuses:
            status({"notice": "checking its data"})
        datasets = [
            _dataset(study, site, data, work, options.registry, options.cache_gb)
            for site, data, work in zip(options.site, options.data, works, strict=True)
        ]
        for status in statuses:
            status({"notice": "compiling the model, which takes up to half a minute"})
        configure_tensorflow(study.training.threads)
        from client.agent import Agent
        from client.package import require_unchanged
        from client.policy import Proposal, epsilon_ceiling
        from client.work import site_plan, site_worker, update_bytes

        plan = site_plan(study)
        workers = [
            site_worker(
                plan,
                dataset,
                work,
                epsilon_ceiling=epsilon_ceiling(one.policy.policy, study, options.epsilon_ceiling),
                report=status,
            )
            for dataset, work, status, one in zip(datasets, works, statuses, passed, strict=True)
        ]
        audits = [
            AuditLog(work, f"site {site}", signer_in(folder), dataset.make_room)
            for site, folder, work, dataset in zip(options.site, options.identity, works, datasets, strict=True)
        ]
        for gate, worker, site, folder, work, audit in zip(
            gates, workers, options.site, options.identity, works, audits, strict=True
        ):
            cases = worker.training_cases + worker.validation_cases
            with _refusal_recorded(study, site, folder, work):
                one = gate.complete(Proposal(study, cases, address.host, update_bytes(plan)))
            audit.record(
                "start-allowed", study=study.name, approval=one.approval.number, policy_sha256=one.policy.digest
            )
        for site, folder, work in zip(options.site, options.identity, works, strict=True):
            with _refusal_recorded(study, site, folder, work):
                require_unchanged()
        secured = [
            _secure_task(study, site, plan, identity, folder, work, gate, audit)
            for site, identity, folder, work, gate, audit in zip(
                options.site, identities, options.identity, works, gates, audits, strict=True
            )
        ]
        agents = [
            Agent(
                study.name,
                site,
                worker,
                address,
                identity,
                work,
                status,
                dataset.make_room,
                audit=audit,
                gate=gate,
                secure=secure,
                renewed=functools.partial(load_identity, folder),
            )
            for site, worker, identity, work, status, dataset, audit, gate, secure, folder in zip(
                options.site,
                workers,
                identities,
                works,
                statuses,
                datasets,
                audits,
                gates,
                secured,
                options.identity,
                strict=True,
            )
        ]
        return _run(agents, options.site, statuses)


def _log_context(study: Study, sites: list[str]) -> Context:
    """Of which site a line is: of the only one, or of that whose thread it comes from."""

    def context(record: logging.LogRecord) -> dict[str, str]:
        site = sites[0] if len(sites) == 1 else str(record.threadName).removeprefix("wardround-")
        return {"study": study.name} | ({"site": site} if site in sites else {})

    return context


@contextlib.contextmanager
def _refusal_recorded(study: Study, site: str, identity: Path, work: Path) -> Iterator[None]:
    """Records in the site's audit log where approval or policy do not let it start; the class of the reason alone."""
    from common.errors import ApprovalError, IdentityError, PolicyError, PolicyFileError, RunFolderError
    from common.security.audit import AuditLog
    from common.security.signing import signer_in

    try:
        yield
    except (ApprovalError, IdentityError, PolicyError, PolicyFileError) as error:
        with (
            contextlib.suppress(RunFolderError, IdentityError),  # the refusal is the error to show
            contextlib.closing(AuditLog(work, f"site {site}", signer_in(identity))) as audit,
        ):
            audit.record("start-refused", study=study.name, reason=type(error).__name__)
        raise


def _secure_task(
    study: Study, site: str, plan: StudyPlan, identity: Identity, folder: Path, work: Path, gate: SiteGate, audit: Audit
) -> SecureTask | None:
    """The site's side of secure sums; None where the study has none.

    Raises IdentityError where the identity has no key that signs.
    """
    if not study.secure_aggregation.required:
        return None
    from client.secure_task import SecureTask
    from client.work import secure_specs
    from common.secure_aggregation.session import small_cohort_warning
    from common.security.signing import load_signer

    if warning := small_cohort_warning(len(study.cohort.sites)):
        logging.warning("%s: %s", site, warning)
    return SecureTask(
        study,
        site,
        plan.digest,
        identity.run,
        secure_specs(plan),
        signer=load_signer(folder),
        folder=work,
        policy=gate.secure_policy,
        audit=audit,
    )


def _gate(options: argparse.Namespace, study: Study, place: Place, work: Path, host: str) -> SiteGate:
    """What must let this site pass, now and at every task."""
    from client.approvals import Approvals, Subject
    from client.gate import SiteGate
    from client.package import installed_package
    from client.policy import Proposal
    from client.review import data_name
    from common.network_sizes import size_without_tensorflow

    assert place.data is not None, "the option is required"
    subject = Subject(place.site, study, installed_package(), data_name(place.data, options.registry))
    policy, required = policy_path(options.policy, work)
    assert policy is not None, "a site has a work folder"
    size = size_without_tensorflow(study)
    proposal = Proposal(study, None, host, {"train": size.update_bytes} if size else {})
    review = command_text("review", options.study, place, policy=options.policy)
    approve = command_text("approve", options.study, place, "--by NAME", policy=options.policy)
    todo = f"look at it with\n  {review}\nand, if it may run, approve it with\n  {approve}"
    return SiteGate(Approvals(work, place.identity), subject, policy, proposal, policy_required=required, todo=todo)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of gigabytes from 0, found {text!r}")
    return value


def _dataset(study: Study, site: str, data: str, work: Path, registry: Path | None, cache_gb: float) -> SiteDataset:
    """The site's cases that are fit for the study, and what keeps others out."""
    from client.case_cache import CaseCache
    from client.data_selection import select
    from client.datasets import site_dataset

    cases = select(study, data, work, registry)
    for finding in cases.findings:
        if finding.level == "error":
            logging.warning("%s: %s %s", site, finding.code, printable(finding.message))
    cache = CaseCache(work / "cache", int(cache_gb * 1e9))
    cache.keep_only({cases.key(case, study) for case in cases.cases})
    dataset = site_dataset(study, site, cases, cache)
    logging.info(
        "%s: %d training and %d validation cases, %d kept out by errors, %d warnings",
        site,
        len(dataset.training_cases),
        len(dataset.validation_cases),
        cases.kept_out,
        sum(finding.level == "warning" for finding in cases.findings),
    )
    return dataset


def _run(agents: list[Any], sites: list[str], statuses: list[SiteStatus]) -> int:
    """Runs every agent in a thread of its own; the first failure ends all."""
    from client.job import THREAD as WORK_THREAD

    failures: list[BaseException] = []

    if len(agents) > 1:
        for handler in logging.getLogger().handlers:
            handler.addFilter(NamesSite())

    def attend(agent: Any, site: str, status: SiteStatus) -> None:
        works_for(site)
        failure: BaseException | None = None
        try:
            closing = agent.run()
            if closing:
                logging.info("%s: %s", site, closing)
        except BaseException as error:
            failure = error
            failures.append(error)
            if len(agents) > 1:  # the others may go on for hours before the command ends with this error
                logging.error("%s: has ended: %s", site, error)
        status.end(failure)

    threads = [
        threading.Thread(target=attend, args=each, name=f"wardround-{each[1]}")
        for each in zip(agents, sites, statuses, strict=True)
    ]

    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for agent in agents:
            agent.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for thread in threads:
        thread.start()
    for thread in threads:
        # Waking up now and then: a signal that another thread receives, or that comes just before a wait, ends none.
        while thread.is_alive():
            thread.join(_SIGNAL_SECONDS)
    while any(thread.name == WORK_THREAD for thread in threading.enumerate()):
        # A batch of training cannot be interrupted. All that it could still write is put in place whole or not at all.
        if stopped:
            logging.shutdown()
            os._exit(128 + stopped[0])
        time.sleep(0.05)
    if failures:
        raise failures[0]
    return 128 + stopped[0] if stopped else 0


def _status(options: argparse.Namespace) -> int:
    status = read_status(options.work)
    print(json.dumps(status) if options.json else status_text(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
