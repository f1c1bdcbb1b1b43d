"""The `wardround-site` command: the hospital's side."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.command_line import CommandParser
from client.data_cli import add_data_commands
from client.model_cli import add_model_commands
from client.predict_cli import add_predict_command
from client.site_status import SiteStatus, read_status, status_text
from common.cli import exit_codes_epilog, run_command
from common.errors import IdentityError, UsageError
from common.study import Study, load_study
from common.version import VERSION
from common.wording import printable

if TYPE_CHECKING:
    from client.datasets import SiteDataset

CACHE_GB = 20.0


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

    start = commands.add_parser("start", help="take part in a study until it is over")
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
    start.add_argument(
        "--epsilon-ceiling",
        type=_positive,
        metavar="E",
        help="the most privacy that all studies of a work folder may spend together, whatever their own budgets "
        "(patient-level privacy; default: each study's budget alone)",
    )
    start.set_defaults(handler=_start)

    add_data_commands(commands)
    add_model_commands(commands)
    add_predict_command(commands)

    status = commands.add_parser("status", help="what this site is doing")
    status.add_argument("--work", type=Path, required=True, help="the --work folder the site was started with")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(handler=_status)

    options = parser.parse_args(arguments)
    return run_command(lambda: options.handler(options))


def _start(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the agent says itself why it has no connection
    from common.learning.runtime import configure_tensorflow
    from common.security.certificates import load_identity
    from common.wire.channel import parse_address

    study = load_study(options.study)
    works = options.work or [Path(f"wardround-{site}") for site in options.site]
    if not len(options.site) == len(options.data) == len(options.identity) == len(works):
        raise UsageError("--site, --data, --identity and --work: give each the same number of times, in the same order")
    for site in options.site:
        if site not in study.cohort.sites:
            raise UsageError(
                f"--site {site}: not in the study's cohort ({', '.join(study.cohort.sites)}); correct the name"
            )
    address = parse_address(options.coordinator)
    identities = []
    for site, folder in zip(options.site, options.identity, strict=True):
        identity = load_identity(folder)
        if identity.role != "site" or identity.name != site:
            raise IdentityError(
                f"{folder}: the certificate is of {identity.role} {identity.name!r}, not of site {site!r}; give "
                "this site's own"
            )
        identities.append(identity)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    with contextlib.ExitStack() as stack:
        statuses = [
            stack.enter_context(SiteStatus(work, study.name, site))
            for site, work in zip(options.site, works, strict=True)
        ]
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
        from client.work import site_plan, site_worker

        plan = site_plan(study)
        workers = [
            site_worker(plan, dataset, work, epsilon_ceiling=options.epsilon_ceiling, report=status)
            for dataset, work, status in zip(datasets, works, statuses, strict=True)
        ]
        agents = [
            Agent(study.name, site, worker, address, identity, work, status, dataset.make_room)
            for site, worker, identity, work, status, dataset in zip(
                options.site, workers, identities, works, statuses, datasets, strict=True
            )
        ]
        return _run(agents, options.site, statuses)


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

    def attend(agent: Any, site: str, status: SiteStatus) -> None:
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
        thread.join()  # signals are handled meanwhile
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
