"""The `wardround` command: runs studies, simulates them, says how they stand, evaluates and publishes their models.

Whatever loads TensorFlow or gRPC is imported by the subcommand that needs it, so that help and status answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import exit_codes_epilog, run_command
from common.errors import DataError, RunFolderError, UsageError
from common.study import HOLDOUT, load_study
from common.version import VERSION
from server.run_folder import RunFolder

_POLL_SECONDS = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (`common.cli.EXIT_CODES`)."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    code: int = arguments.run_subcommand(arguments)
    return code


# Arguments. --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wardround",
        description="Federated training of medical image segmentation models: the images never leave the hospital.",
        epilog=exit_codes_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wardround {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, handler: Any, summary: str, description: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=description or f"{summary[0].upper()}{summary[1:]}."
        )
        added.set_defaults(run_subcommand=handler)
        return added

    simulate = command(
        "simulate",
        _simulate,
        "run a study on this machine, every site a process",
        "Runs a study on this machine: a coordinator and its sites as processes that speak mutual TLS over loopback. "
        "Without STUDY, five hospitals on generated images. A run that was interrupted is continued with its --run.",
    )
    simulate.add_argument("study", nargs="?", type=Path, metavar="STUDY", help="study file (default: the example)")
    simulate.add_argument("--data", type=Path, metavar="DIR", help="holds a folder a site, and may hold holdout/")
    simulate.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<study>-<time>)")
    simulate.add_argument("--in-process", action="store_true", help="all sites as threads of one process")
    simulate.add_argument("--json", action="store_true", help="print the final figures as JSON")

    coordinator = command("coordinator", _coordinator, "run the coordinator of a study, or continue it")
    coordinator.add_argument("study", type=Path, metavar="STUDY", help="study file")
    coordinator.add_argument("--run", type=Path, metavar="DIR", required=True, help="run folder")
    coordinator.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:8443", help="address to serve (default: %(default)s)"
    )
    coordinator.add_argument(
        "--identity", type=Path, metavar="DIR", help="certificate and key (default: identity/coordinator in the run)"
    )
    coordinator.add_argument("--holdout", type=Path, metavar="DIR", help="the coordinator's own labelled images")
    coordinator.add_argument("--json", action="store_true", help="print the final figures as JSON")

    certificates = command("certificates", _certificates, "make the certificates of a study's coordinator and sites")
    certificates.add_argument("study", type=Path, metavar="STUDY", help="study file")
    certificates.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make them in")
    certificates.add_argument(
        "--host",
        metavar="HOST",
        action="append",
        required=True,
        help="name or address at which the sites reach the coordinator; may be repeated",
    )
    certificates.add_argument("--json", action="store_true", help="print the folders as JSON")

    status = command("status", _status, "say how a run stands, who holds it up and what to do next")
    _add_run(status)
    status.add_argument("--json", action="store_true", help="print the status as JSON")

    watch = command("watch", _watch, "follow a run until it ends")
    _add_run(watch)

    for name, handler, summary in (
        ("evaluate", _evaluate, "evaluate a model of a run on the holdout"),
        ("publish", _publish, "publish a model of a run, quantized and measured"),
    ):
        added = command(name, handler, summary)
        _add_run(added)
        added.add_argument(
            "--holdout", type=Path, metavar="DIR", help="labelled images (default: those of a simulation in the run)"
        )
        added.add_argument("--round", type=_round, metavar="N", help="the model after round N (default: the best)")
        added.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: the newest in runs/)")


def _round(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected the number of a round, from 1, found {text!r}")
    return int(text)


def _run_folder(given: Path | None) -> RunFolder:
    if given is not None:
        return RunFolder(given)
    written = {
        path.parent: path.stat().st_mtime
        for name in ("study.yaml", "status.json")
        for path in Path("runs").glob(f"*/{name}")
    }
    if not written:
        raise RunFolderError(f"{Path('runs').absolute()}: no runs here; give the folder of a run with --run")
    return RunFolder(max(written, key=lambda path: written[path]))


def _holdout(given: Path | None, run: RunFolder) -> Path:
    if given is not None:
        return _existing(given)
    generated = run.path / "hospitals" / HOLDOUT
    if not generated.is_dir():
        raise UsageError(f"{run.path}: this run has no holdout of its own; give its labelled images with --holdout DIR")
    return generated


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: the folder does not exist; give one that holds images/ and labels/ with --holdout")
    return folder


# Subcommands. ------------------------------------------------------------------------------------------------------


def _simulate(arguments: argparse.Namespace) -> int:
    from server.simulation.launcher import simulate

    return simulate(
        arguments.study,
        data=arguments.data,
        run=arguments.run,
        in_process=arguments.in_process,
        json_output=arguments.json,
    )


def _coordinator(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study)
    run = RunFolder(arguments.run)
    holdout = None if arguments.holdout is None else _existing(arguments.holdout)
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("wardround").addHandler(log)
    logging.getLogger("wardround").setLevel(logging.INFO)
    logging.getLogger("wardround").propagate = False  # TensorFlow Federated gives the root logger a handler
    from server import coordinator

    code = coordinator.run(
        study,
        run,
        listen=arguments.listen,
        identity=arguments.identity or run.identity / "coordinator",
        holdout=holdout,
    )
    if code == 0 and arguments.json and run.report.exists():
        print(run.report.read_text(encoding="utf-8").rstrip())
    return code


def _certificates(arguments: argparse.Namespace) -> int:
    from common.security.certificates import CERTIFICATE, ensure_simulation_identities

    study = load_study(arguments.study)
    out: Path = arguments.out
    folders = {site: out / "sites" / site for site in study.cohort.sites}
    kept = [folder for folder in (out / "coordinator", *folders.values()) if (folder / CERTIFICATE).exists()]
    ensure_simulation_identities(out, study.name, study.cohort.sites, arguments.host)
    if arguments.json:
        _print_json(
            {
                "authority": str(out / "authority"),
                "coordinator": str(out / "coordinator"),
                "sites": {site: str(folder) for site, folder in folders.items()},
                "kept": [str(folder) for folder in kept],
            }
        )
        return 0
    width = max(map(len, ["the coordinator", *folders]))
    print(f"{'the coordinator':<{width}}  {out / 'coordinator'}")
    for site, folder in folders.items():
        print(f"{site:<{width}}  {folder}")
    if kept:
        print(f"There before, and left as they were: {', '.join(map(str, kept))}")
    print(
        "\nThese folders hold private keys, which were made on this machine. Carry each site's folder to its hospital "
        "over a\nsafe channel, for `wardround-site start --identity`, and delete it here. Keep "
        f"{out / 'authority'} offline:\nwhoever has it can pose as any site."
    )
    return 0


def _read(run: RunFolder) -> dict[str, Any]:
    from server.status import complete

    status = run.read_status()
    return complete(status, run.read_study()) if run.study.exists() else status


def _status(arguments: argparse.Namespace) -> int:
    from server.status import describe, status_text

    run = _run_folder(arguments.run)
    status = _read(run)
    if arguments.json:
        description = describe(status)
        said = {"headline": description.headline, "cause": description.cause, "next_step": description.next_step}
        _print_json({**status, "run": str(run.path), "description": said})
    else:
        print(status_text(status))
        print(f"  {'run':<8}{run.path}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from server.status import output, view

    run = _run_folder(arguments.run)
    try:
        with view(output()) as shown:
            while True:
                status = _read(run)
                shown.show(status)
                if not status["running"]:
                    return 0
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    run = _run_folder(arguments.run)
    run.read_study()
    holdout = _holdout(arguments.holdout, run)
    from server import coordinator

    result: Mapping[str, Any] = coordinator.evaluate(run, holdout, arguments.round)
    if arguments.json:
        _print_json(result)
        return 0
    from server.status import holdout_table, output

    output().print(holdout_table(result.get("holdout", result)))
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    run = _run_folder(arguments.run)
    study = run.read_study()
    wanted = study.evaluation.holdout or arguments.holdout is not None
    holdout = _holdout(arguments.holdout, run) if wanted else None
    from server import coordinator

    result: Mapping[str, Any] = coordinator.publish(run, holdout, arguments.round)
    if arguments.json:
        _print_json(result)
        return 0
    from server.status import output, variants_table

    publication = result.get("publication", result)
    output().print(variants_table(publication))
    print(f"\nThe model lies in {publication.get('folder')}")
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


if __name__ == "__main__":
    sys.exit(main())
