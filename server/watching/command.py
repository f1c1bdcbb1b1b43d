"""The options of `wardround coordinator` by which it is watched, and `wardround logs`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import RunFolderError, UsageError
from common.watching.logs import FORMATS
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from server.watching.watch import Watching

_FindRun = Callable[[Path | None], RunFolder]


def add_watching_options(parser: argparse.ArgumentParser) -> None:
    """`--metrics` and `--watching`."""
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        help="serve Prometheus metrics, /healthz and /readyz there, on loopback without HOST; there are no passwords",
    )
    parser.add_argument(
        "--watching", type=Path, metavar="FILE", help="YAML: alerts, their webhook, tracking (docs/watching.md)"
    )


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """`--log-format`."""
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="of what it says on stderr (default: %(default)s)"
    )


def watching_of(arguments: argparse.Namespace) -> Watching:
    """What the options say. Raises UsageError."""
    from server.watching.options import load_options
    from server.watching.watch import Watching

    return Watching(arguments.metrics, load_options(arguments.watching))


def add_logs_command(commands: Any, find_run: _FindRun) -> argparse.ArgumentParser:
    """`wardround logs`; `find_run` maps `--run` to the run folder."""
    from server.watching.log_reader import LEVELS

    summary = "show what a run's coordinator has logged"
    logs: argparse.ArgumentParser = commands.add_parser(
        "logs", help=summary, description="Shows what a run's coordinator has logged, oldest first."
    )
    logs.add_argument("--follow", action="store_true", help="go on with what is logged, until the coordinator ends")
    logs.add_argument("--site", metavar="NAME", help="of this site alone")
    logs.add_argument("--round", type=int, metavar="N", help="of this round alone")
    logs.add_argument("--level", choices=LEVELS, default="info", help="from this level on (default: %(default)s)")
    logs.add_argument("--json", action="store_true", help="print JSON, an object a line")
    logs.set_defaults(run_subcommand=lambda arguments: _logs(arguments, find_run(arguments.run)))
    return logs


def _logs(arguments: argparse.Namespace, run: RunFolder) -> int:
    from server.status import clean
    from server.watching.log_reader import LOG, Wanted, entry_text, follow_log, read_log

    study = run.read_study()
    if arguments.site is not None and arguments.site not in study.cohort.sites:
        raise UsageError(f"--site {arguments.site}: not in the study; its sites are {', '.join(study.cohort.sites)}")
    if arguments.round is not None and not 0 < arguments.round <= study.training.rounds:
        raise UsageError(f"--round {arguments.round}: the study has rounds 1 to {study.training.rounds}")
    if not arguments.follow and not (run.path / LOG).exists():
        raise RunFolderError(f"{run.path / LOG}: no log here yet; it begins when a coordinator is started")
    wanted = Wanted(arguments.level, arguments.site, arguments.round)
    try:
        for entry in follow_log(run.path, run.is_locked) if arguments.follow else read_log(run.path):
            if wanted(entry):
                text = json.dumps(entry) if arguments.json else clean(entry_text(entry)).replace("\n", " ")
                print(text, flush=arguments.follow)
    except KeyboardInterrupt:
        pass
    return 0
