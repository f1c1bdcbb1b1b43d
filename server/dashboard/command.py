"""`wardround page`, `report` and `compare`: what is made of run folders for people to look at."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, Final

DEFAULT_LISTEN: Final = "127.0.0.1:8080"
_NICENESS: Final = 10


def add_dashboard_commands(commands: Any) -> None:
    """Adds the commands to those of `wardround` (what `add_subparsers` returned)."""
    page = commands.add_parser(
        "page",
        help="show a run as a live page",
        description="Serves the live page of a run until it is stopped. It only reads the run folder, so it may be "
        "started and stopped at any time, also while no coordinator runs. Beyond loopback it is served by TLS, to "
        "those with a login token or a certificate of the study (docs/watching.md).",
    )
    page.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: the newest in runs/)")
    page.add_argument(
        "--listen", metavar="HOST:PORT", default=DEFAULT_LISTEN, help="address to serve (default: %(default)s)"
    )
    page.add_argument(
        "--identity",
        type=Path,
        metavar="DIR",
        help="the coordinator's, for TLS beyond loopback (default: identity/coordinator in the run)",
    )
    page.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="further name that the page is asked by"
    )
    page.add_argument("--login", action="store_true", help="ask for a login on loopback too")
    page.add_argument("--with-stdin", action="store_true", help=argparse.SUPPRESS)
    page.set_defaults(run_subcommand=_page)
    actions = page.add_subparsers(title="actions", metavar="[ACTION]")
    token = actions.add_parser(
        "token",
        help="make, list or revoke login tokens",
        description="Makes a login token for the page of a run and prints it, once: only a digest of it is kept.",
    )
    token.add_argument("--run", type=Path, metavar="DIR", default=argparse.SUPPRESS, help="run folder")
    token.add_argument("--role", choices=("observer", "investigator"), help="what its bearer may see")
    token.add_argument("--name", metavar="NAME", default="", help="whom it is for")
    token.add_argument(
        "--expires", metavar="WHEN", default="30d", help="12h, 30d, or a day such as 2027-01-31 (default: %(default)s)"
    )
    token.add_argument("--list", action="store_true", help="list the tokens that were made")
    token.add_argument("--revoke", metavar="ID", help="shut a token out, at once")
    token.add_argument("--json", action="store_true", help="print the result as JSON")
    token.set_defaults(run_subcommand=_token)

    report = commands.add_parser(
        "report",
        help="write a finished study's report",
        description="Writes the report of a run as one HTML file that needs nothing else: study, cohort, curves, "
        "tables, pictures, published files, privacy, audit heads as they were verified, software.",
    )
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: report.html in the run)")
    report.add_argument("--pdf", action="store_true", help="write a PDF too, by an installed Chromium")
    report.add_argument(
        "--authority",
        type=Path,
        metavar="FILE",
        help="ca.crt of the study (default: $WARDROUND_AUTHORITY, else that of the run, with a warning)",
    )
    report.add_argument("--json", action="store_true", help="print what was written as JSON")
    report.set_defaults(run_subcommand=_report)

    compare = commands.add_parser(
        "compare",
        help="put runs beside each other",
        description="Compares runs: the settings that differ, the final figures, and with --out the curves over each "
        "other in one HTML file.",
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, at least two")
    compare.add_argument("--out", type=Path, metavar="FILE", help="write the curves as an HTML file")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    compare.set_defaults(run_subcommand=_compare)


def add_page_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--page` to a command that runs a study."""
    parser.add_argument(
        "--page",
        nargs="?",
        const=DEFAULT_LISTEN,
        metavar="HOST:PORT",
        help=f"show the run as a live page meanwhile, as `wardround page` does (default: {DEFAULT_LISTEN})",
    )


def _page(arguments: argparse.Namespace) -> int:
    import asyncio

    from common.webpage.serving import serve
    from server.dashboard.setup import prepare
    from server.run_folder import newest_run

    run = newest_run(arguments.run)
    page = prepare(
        run, arguments.listen, identity=arguments.identity, hosts=tuple(arguments.host), login=arguments.login
    )
    os.nice(max(_NICENESS - os.nice(0), 0))  # whoever trains comes first
    asyncio.run(serve(page.app, page.address, page.tls, page.started, with_stdin=arguments.with_stdin))
    return 0


def _token(arguments: argparse.Namespace) -> int:
    from common.cli import print_json
    from common.errors import UsageError
    from server.dashboard.tokens import PageTokens, expiry
    from server.run_folder import newest_run

    run = newest_run(getattr(arguments, "run", None))
    run.read_study()
    tokens, now = PageTokens(run.path), time.time()
    if sum((arguments.list, arguments.revoke is not None, arguments.role is not None)) != 1:
        raise UsageError("page token: give one of --role (make a token), --list and --revoke")
    if arguments.role is not None:
        made, text = tokens.make(arguments.role, arguments.name or arguments.role, expiry(arguments.expires, now))
        if arguments.json:
            print_json({"id": made.id, "role": made.role, "name": made.name, "expires": made.expires, "token": text})
        else:
            print(
                f"Token {made.id} of {made.role} {made.name!r}, until {_utc(made.expires)}:\n\n{text}\n\n"
                "It is shown this once. Hand it over on a channel that you would trust with a password; shut it out "
                f"with\n  wardround page token --run {run.path} --revoke {made.id}"
            )
        return 0
    if arguments.revoke is not None:
        tokens.revoke(arguments.revoke, now)
    listed = [
        {"id": one.id, "role": one.role, "name": one.name, "expires": one.expires, "state": one.state(now)}
        for one in tokens.all()
    ]
    if arguments.json:
        print_json({"tokens": listed})
        return 0
    for one in tokens.all():
        print(f"{one.id}  {one.role:<12}  {one.name:<20}  until {_utc(one.expires)}  {one.state(now)}")
    if not listed:
        print("No token was made for this run's page.")
    return 0


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _report(arguments: argparse.Namespace) -> int:
    from common.cli import print_json
    from common.security.authorities import authority_for
    from server.dashboard.pdf import print_to_pdf
    from server.dashboard.report import write_report
    from server.run_folder import RunFolder

    run = RunFolder(arguments.run)
    authority = authority_for(arguments.authority, run.identity / "coordinator" / "ca.crt")
    report = write_report(run, arguments.out or run.path / "report.html", authority)
    written = [report.path]
    if arguments.pdf:
        written.append(print_to_pdf(written[0]))
    if arguments.json:
        print_json({"written": [str(path) for path in written]})
    else:
        print("\n".join(str(path) for path in written))
    if report.trouble is not None:
        raise report.trouble  # the report says so too; a script is to hear of it
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from common.cli import print_json
    from common.errors import UsageError
    from server.dashboard.comparison import compare, print_comparison, write_comparison
    from server.run_folder import RunFolder

    if len(arguments.runs) < 2:
        raise UsageError("compare: give at least two run folders")
    found = compare([RunFolder(path) for path in arguments.runs])
    if arguments.out is not None:
        write_comparison(found, arguments.out)
    if arguments.json:
        print_json(found.plain())
    else:
        print_comparison(found)
        if arguments.out is not None:
            print(f"\nThe curves lie in {arguments.out}")
    return 0
