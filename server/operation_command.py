"""`wardround status`, `watch`, `rounds`, `stop` and `publish` from another machine."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import print_json
from common.errors import NetworkError, TrainingError, UsageError
from server.run_folder import newest_run

if TYPE_CHECKING:
    from server.remote import Remote

_IDENTITY = "folder of an investigator's or observer's identity, with --coordinator"


def add_remote(parser: argparse.ArgumentParser, identity: str | None = _IDENTITY) -> None:
    """Adds --coordinator and --identity; `identity`: what its help says, None where the command has its own."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="ask this coordinator from another machine, instead of --run"
    )
    if identity is not None:
        parser.add_argument("--identity", type=Path, metavar="DIR", help=identity)


def add_operation_commands(commands: Any) -> None:
    """Adds `rounds` and `stop` to the sub-commands of `wardround` (what `add_subparsers` returned)."""
    rounds = commands.add_parser(
        "rounds",
        help="print the figures of a run by round",
        description="Prints the figures by round: of a run on this machine, or with --coordinator of one elsewhere, as "
        "far as the identity's role may see them.",
    )
    rounds.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: the newest in runs/)")
    add_remote(rounds)
    rounds.add_argument("--json", action="store_true", help="print every column as JSON")
    rounds.set_defaults(run_subcommand=_rounds)

    stop = commands.add_parser(
        "stop",
        help="stop a coordinator on another machine, in good order",
        description="Stops a coordinator in good order, as SIGTERM does; started again with the same command, it goes "
        "on where it was. For investigators.",
    )
    stop.add_argument("--coordinator", metavar="HOST:PORT", required=True, help="its address")
    stop.add_argument(
        "--identity", type=Path, metavar="DIR", required=True, help="folder of an investigator's identity"
    )
    stop.add_argument("--reason", default="", metavar="TEXT", help="for the coordinator's log and audit log")
    stop.add_argument("--json", action="store_true", help="print the result as JSON")
    stop.set_defaults(run_subcommand=_stop)


@contextlib.contextmanager
def remote(arguments: argparse.Namespace, *others: str) -> Iterator[Remote]:
    """The coordinator that the arguments name.

    Raises UsageError where the identity is missing, or one of `others` (and --run) is given, which is of this machine.
    """
    for option in ("run", *others):
        if getattr(arguments, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise UsageError(f"{flag}: of this machine, and --coordinator asks another one; leave one of them out")
    if arguments.identity is None:
        raise UsageError("--identity: give the folder of the identity by which the coordinator is asked")
    from server.remote import Remote

    with Remote(arguments.coordinator, arguments.identity) as made:
        yield made


def print_remote_status(arguments: argparse.Namespace) -> int:
    """`wardround status --coordinator`."""
    from server.description import described
    from server.status import status_text

    with remote(arguments) as coordinator:
        status = coordinator.status()
    if arguments.json:
        print_json(described(status))
        return 0
    print(status_text(status))
    print(f"  {'at':<8}{arguments.coordinator}")
    return 0


def watch_remote(arguments: argparse.Namespace) -> int:
    """`wardround watch --coordinator`: the exit code is that of `watch`."""
    from server.following import view
    from server.status import output

    status: Mapping[str, Any] = {}
    try:
        with contextlib.suppress(KeyboardInterrupt), remote(arguments) as coordinator, view(output()) as shown:
            for status in coordinator.statuses():
                shown.show(status)
    except NetworkError:
        if status.get("running", True):  # else it said its last word, and hung up
            raise
    return TrainingError.exit_code if status.get("state") == "failed" else 0


def publish_remote(arguments: argparse.Namespace) -> int:
    """`wardround publish --coordinator`."""
    with remote(arguments, "holdout", "old_holdout") as coordinator:
        version, number = coordinator.publish(arguments.round, explain=arguments.explain)
    if arguments.json:
        print_json({"version": version, "round": number})
    else:
        print(
            f"Published {version}, of round {number}; `wardround-site fetch --version {version}` brings it to a site."
        )
    return 0


def _rounds(arguments: argparse.Namespace) -> int:
    from server.status import output, rounds_table
    from server.tables import read_table

    rows: Sequence[Mapping[str, Any]]
    if arguments.coordinator is not None:
        with remote(arguments) as coordinator:
            rows = coordinator.rounds()
    else:
        run = newest_run(arguments.run)
        run.read_study()
        rows = read_table(run.rounds).rows
    if arguments.json:
        print_json([dict(row) for row in rows])
    else:
        output().print(rounds_table(rows))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from server.remote import Remote

    with Remote(arguments.coordinator, arguments.identity) as coordinator:
        coordinator.stop(arguments.reason)
    if arguments.json:
        print_json({"stopped": True})
    else:
        print("The coordinator stops. Started again there with the same command, it goes on where it was.")
    return 0
