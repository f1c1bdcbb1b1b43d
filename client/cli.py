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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.data_cli import add_data_commands, open_registry
from client.site_status import SiteStatus, read_status, status_text
from common.cli import exit_codes_epilog, run_command
from common.errors import IdentityError, UsageError
from common.study import Study, load_study
from common.version import VERSION

if TYPE_CHECKING:
    from client.datasets import SiteDataset
    from client.selection import SiteCases

CACHE_GB = 20.0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = argparse.ArgumentParser(
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
    start.set_defaults(handler=_start)

    check = commands.add_parser("check", help="check this site's images and labels against a study, without connecting")
    check.add_argument("study", type=Path, metavar="STUDY")
    check.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(handler=_check)

    add_data_commands(commands)

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
        from client.work import PlanWorker
        from common.learning.plan import build_plan

        plan = build_plan(study)
        agents = [
            Agent(study.name, site, PlanWorker(plan, dataset), address, identity, status)
            for site, dataset, identity, status in zip(options.site, datasets, identities, statuses, strict=True)
        ]
        return _run(agents, options.site, statuses)


def _gigabytes(text: str) -> float:
    """A finite number of at least 0; argparse makes a usage error of the ValueError."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def _select(study: Study, data: str, work: Path, registry: Path | None) -> SiteCases:
    """The cases of registered data sets, or of a folder; a registered name goes before a folder of that name."""
    from client.data_cli import registry_path
    from client.selection import select_cases, select_folder

    names = data.split(",")
    if registry is not None or registry_path(registry).exists():
        with contextlib.closing(open_registry(registry)) as opened:
            known = {data_set.name for data_set in opened.data_sets()}
            if known.issuperset(names) or not Path(data).is_dir():
                return select_cases(study, names, opened)
    if Path(data).is_dir():
        return select_folder(study, Path(data), work / "folder.sqlite")
    raise UsageError(
        f"--data {data}: neither a registered data set nor a folder; register it with `wardround-site data add`, or "
        "correct the path"
    )


def _dataset(study: Study, site: str, data: str, work: Path, registry: Path | None, cache_gb: float) -> SiteDataset:
    """The site's cases that are fit for the study, and what keeps others out."""
    from client.case_cache import CaseCache
    from client.data_report import printable
    from client.datasets import SiteDataset

    cases = _select(study, data, work, registry)
    for finding in cases.findings:
        if finding.level == "error":
            logging.warning("%s: %s %s", site, finding.code, printable(finding.message))
    cache = CaseCache(work / "cache", int(cache_gb * 1e9))
    cache.keep_only({cases.key(case, study) for case in cases.cases})
    dataset = SiteDataset(study, site, cases, cache)
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
    if failures:
        raise failures[0]
    return 128 + stopped[0] if stopped else 0


def _check(options: argparse.Namespace) -> int:
    from client.data_report import printable
    from client.selection import select_folder
    from common.imaging.splits import split_by_patient

    study = load_study(options.study)
    cases = select_folder(study, options.data)
    training, validation = split_by_patient(cases.cases, study.evaluation.validation_fraction, study.seed)
    counts = {"training_cases": len(training), "validation_cases": len(validation), "kept_out": cases.kept_out}
    if options.json:
        print(json.dumps(counts))
        return 0
    fit = "all fit" if not cases.kept_out else f"{cases.kept_out} kept out by errors"
    print(f"{options.data}: {len(training)} training and {len(validation)} validation cases, {fit}")
    for finding in cases.findings:
        print(f"  {finding.code} {printable(finding.message)}. {finding.advice}")
    return 0


def _status(options: argparse.Namespace) -> int:
    status = read_status(options.work)
    print(json.dumps(status) if options.json else status_text(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
