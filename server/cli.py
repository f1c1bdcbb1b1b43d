"""The `wardround` command: runs studies, simulates them, says how they stand, evaluates and publishes their models.

Whatever loads TensorFlow or gRPC is imported by the subcommand that needs it, so that help and status answer at once.
"""

from __future__ import annotations

import argparse
import csv
import functools
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import exit_codes_epilog, print_json, run_command
from common.errors import DataError, RunFolderError, TrainingError, UsageError
from common.inference.trust import Trust, add_trust_options
from common.study import HOLDOUT, load_study
from common.version import VERSION
from common.watching.logs import set_up_logs
from server.audit_command import add_audit_command
from server.dashboard.command import add_dashboard_commands, add_page_option
from server.identity_command import add_identity_commands
from server.operation_command import (
    add_operation_commands,
    add_remote,
    print_remote_status,
    publish_remote,
    watch_remote,
)
from server.run_folder import RunFolder, newest_run, plainly
from server.verify_command import add_verify_command
from server.watching.command import add_log_format, add_logs_command, add_watching_options, watching_of

_POLL_SECONDS = 0.25
_NOT_YET = "Nothing of this was done yet; the same command without --dry-run does it."
_START = "that the study starts from (training.start_from)"
_START_AGAIN = "This was done. Start the coordinator again with the same command."


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
    _add_old_holdout(simulate)
    simulate.add_argument("--in-process", action="store_true", help="all sites as threads of one process")
    add_trust_options(simulate, has_identity=False, what=_START)
    add_watching_options(simulate)
    add_page_option(simulate)
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
    _add_old_holdout(coordinator)
    add_trust_options(coordinator, has_identity=False, what=_START)
    coordinator.add_argument(
        "--serve", action="store_true", help="after the study's end go on serving what is published, until stopped"
    )
    add_watching_options(coordinator)
    add_log_format(coordinator)
    add_page_option(coordinator)
    coordinator.add_argument("--json", action="store_true", help="print the final figures as JSON")

    add_identity_commands(commands)

    certificates = command(
        "certificates",
        _certificates,
        "make the certificates of a study's coordinator and sites, with the sites' private keys, for trials",
    )
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
    add_remote(status)
    status.add_argument("--json", action="store_true", help="print the status as JSON")

    watch = command("watch", _watch, "follow a run until it ends")
    _add_run(watch)
    add_remote(watch)

    _add_run(add_logs_command(commands, newest_run))

    repair = command(
        "repair",
        _repair,
        "say what is damaged in a run, and repair it",
        "Examines a run that no coordinator runs: journal, states, models, updates, tables, published versions. What "
        "is damaged is moved to damaged/ in the run, never deleted, and the run goes back to its last good round.",
    )
    _add_run(repair)
    repair.add_argument("--dry-run", action="store_true", help="only say what would be done")
    repair.add_argument(
        "--give-up",
        nargs=2,
        metavar=("SITE", "ROUND"),
        help="let a closed round go on without the lost update of a site that never comes back: changes the result",
    )
    repair.add_argument("--json", action="store_true", help="print what was found as JSON")

    evaluate = command(
        "evaluate",
        _evaluate,
        "evaluate a published model on labelled images",
        "Evaluates a file of a published version as a hospital runs it, by LiteRT, on labelled images: by site and "
        "class, and by object where labels are instances (docs/metrics.md). With --round, or where a run has published "
        "nothing yet, the weights after a round instead, by TensorFlow: Dice and IoU.",
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="folder of a published version, or of a run, whose newest version it takes (default: the newest in runs/)",
    )
    evaluate.add_argument("--run", type=Path, metavar="DIR", help="run folder, instead of MODEL")
    _add_holdout(evaluate)
    evaluate.add_argument("--variant", metavar="NAME", help="which file of the version (default: float32)")
    evaluate.add_argument("--round", type=_round, metavar="N", help="the weights after round N of the run")
    evaluate.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each image and class to a CSV file")
    add_trust_options(evaluate, has_identity=False)
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")

    publish = command("publish", _publish, "publish a model of a run, quantized and measured")
    _add_run(publish)
    _add_holdout(publish)
    _add_old_holdout(publish)
    publish.add_argument(
        "--identity",
        type=Path,
        metavar="DIR",
        help="the coordinator's, which signs (default: that in the run); with --coordinator, an investigator's",
    )
    add_remote(publish, identity=None)
    publish.add_argument("--without-holdout", action="store_true", help="measure nothing, and leave out int8")
    publish.add_argument("--round", type=_round, metavar="N", help="the model after round N (default: the best)")
    publish.add_argument("--explain", action="store_true", help="with the file for `predict --explain`")
    publish.add_argument("--json", action="store_true", help="print the result as JSON")

    add_dashboard_commands(commands)
    add_operation_commands(commands)
    add_verify_command(commands)
    add_audit_command(commands)
    return parser


def _add_holdout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--holdout", type=Path, metavar="DIR", help="labelled images (default: those of a simulation in the run)"
    )


def _add_old_holdout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--old-holdout",
        type=Path,
        metavar="DIR",
        help="labelled images of the study whose model this one starts from, to tell what is forgotten of them",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: the newest in runs/)")


def _round(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected the number of a round, from 1, found {text!r}")
    return int(text)


def _holdout(given: Path | None, run: RunFolder) -> Path:
    if given is not None:
        return _existing(given)
    generated = run.path / "hospitals" / HOLDOUT
    if not generated.is_dir():
        raise UsageError(f"{run.path}: this run has no holdout of its own; give its labelled images with --holdout DIR")
    return generated


def _existing(folder: Path, option: str = "--holdout") -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: the folder does not exist; give one that holds images/ and labels/ with {option}")
    return folder


# Subcommands. ------------------------------------------------------------------------------------------------------


def _simulate(arguments: argparse.Namespace) -> int:
    from server.simulation.launcher import simulate

    watching_of(arguments)  # what is wrong with it is said before anything starts
    given = {
        "--old-holdout": arguments.old_holdout and _existing(arguments.old_holdout, "--old-holdout"),
        "--authority": arguments.authority and arguments.authority.absolute(),
        "--metrics": arguments.metrics,
        "--watching": arguments.watching and arguments.watching.absolute(),
    }
    options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    return simulate(
        arguments.study,
        data=arguments.data,
        run=arguments.run,
        in_process=arguments.in_process,
        json_output=arguments.json,
        coordinator_options=[*options, "--allow-unsigned"] if arguments.allow_unsigned else options,
        page=arguments.page,
    )


def _coordinator(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study)
    run = RunFolder(arguments.run)
    holdout = None if arguments.holdout is None else _existing(arguments.holdout)
    set_up_logs(arguments.log_format, context=lambda record: {"study": study.name})
    watching = watching_of(arguments)
    from server import coordinator
    from server.dashboard.beside import page_beside

    setup = coordinator.Setup(
        listen=arguments.listen,
        identity=arguments.identity or run.identity / "coordinator",
        holdout=holdout,
        old_holdout=None if arguments.old_holdout is None else _existing(arguments.old_holdout, "--old-holdout"),
        serve=arguments.serve,
        watching=watching,
        trust=functools.partial(Trust.of_run, arguments),
    )
    run.prepare(study)
    with page_beside(run, arguments.page, setup.identity, logging.getLogger("wardround.coordinator").info):
        code = coordinator.run(study, run, setup)
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
        print_json(
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


def _status(arguments: argparse.Namespace) -> int:
    from server.description import described
    from server.status import status_text
    from server.watching.snapshot import NewestStatus

    if arguments.coordinator is not None:
        return print_remote_status(arguments)
    run = newest_run(arguments.run)
    status = NewestStatus(run.path).read()
    if arguments.json:
        print_json(described({**status, "run": str(run.path)}))
    else:
        print(status_text(status))
        print(f"  {'run':<8}{run.path}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from server.following import view
    from server.status import output
    from server.watching.snapshot import NewestStatus

    if arguments.coordinator is not None:
        return watch_remote(arguments)
    newest = NewestStatus(newest_run(arguments.run).path)
    try:
        with view(output()) as shown:
            while True:
                status = newest.read()
                shown.show(status)
                if not status["running"]:
                    return TrainingError.exit_code if status.get("state") == "failed" else 0
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return 0


def _repair(arguments: argparse.Namespace) -> int:
    from server.repair import audit_fault, examine, give_up, repair

    run = newest_run(arguments.run)
    if run.is_locked():
        raise RunFolderError(f"{run.path}: a coordinator runs this study; stop it first, then repair")
    if arguments.give_up is not None:
        site, number = arguments.give_up
        try:
            said = give_up(run, site, _round(number), dry_run=arguments.dry_run)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--give-up: {error}") from error
        if arguments.json:
            print_json({"run": str(run.path), "dry_run": arguments.dry_run, "given_up": said})
        else:
            print("\n".join(said))
            print(_NOT_YET if arguments.dry_run else _START_AGAIN)
        return 0
    found = examine(run) if arguments.dry_run else repair(run)
    damage = [each for each in found if not each.awaited]
    audit = audit_fault(run)
    code = audit.exit_code if audit else RunFolderError.exit_code if damage and arguments.dry_run else 0
    if arguments.json:
        findings = [
            {"path": each.path, "problem": each.problem, "action": each.action, "awaited": each.awaited}
            for each in found
        ]
        print_json(
            {"run": str(run.path), "dry_run": arguments.dry_run, "findings": findings, "audit": audit and str(audit)}
        )
        return code
    from server.status import clean

    for each in damage:
        print(clean(f"{plainly(f'{each.path}: {each.problem}')}\n  {each.action}"))
    if not damage and not audit:
        print(f"{run.path}: nothing is damaged")
    elif damage:
        print(_NOT_YET if arguments.dry_run else _START_AGAIN)
    awaited = [each for each in found if each.awaited]
    if awaited:
        print("\nAwaited from the sites when the coordinator runs, and no damage:")
    for each in awaited:
        print(clean(f"{plainly(f'{each.path}: {each.problem}')}\n  {each.action}"))
    if audit:
        raise audit
    return code


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.model is not None and arguments.run is not None:
        raise UsageError("MODEL and --run both say what to evaluate; leave one of them out")
    given: Path | None = arguments.model or arguments.run
    if arguments.round is not None:
        return _evaluate_round(arguments, newest_run(given))
    from common.inference.published import open_published
    from server.evaluation.published import evaluate_published
    from server.versions import authority_of, is_version, newest_version, run_of

    if given is not None and is_version(given):
        version, run = given, run_of(given)
    else:
        run = newest_run(given)
        run.read_study()
        newest = newest_version(run)
        if newest is None:
            return _evaluate_round(arguments, run)
        version = newest
    if run is None and arguments.holdout is None:
        raise UsageError(f"{version}: it is in no run that has images; give labelled ones with --holdout DIR")
    holdout = _existing(arguments.holdout) if run is None else _holdout(arguments.holdout, run)
    if arguments.csv is not None and not arguments.csv.absolute().parent.is_dir():
        raise UsageError(f"{arguments.csv}: its folder does not exist; make it, or give another --csv")
    trust = Trust.of_run(arguments, authority_of(version))
    model = open_published(version, arguments.variant or ("float32" if version.is_dir() else None), trust)
    trust.warn()
    result = evaluate_published(model, holdout, run.read_study().cohort.sites if run is not None else None)
    if arguments.csv is not None:
        _write_csv(arguments.csv, result.rows())
    scalars = result.scalars()
    if arguments.json:
        print_json({"version": model.version, "variant": model.variant, "holdout": scalars})
        return 0
    from server.evaluation.tables import tables
    from server.status import output

    console = output()
    console.print(f"{model.study.name} {model.version}, {model.variant}", markup=False)
    for part in tables(scalars):
        console.print()
        console.print(part)
    return 0


def _evaluate_round(arguments: argparse.Namespace, run: RunFolder) -> int:
    run.read_study()
    if arguments.variant is not None or arguments.csv is not None:
        raise UsageError(
            "--variant and --csv are of published versions, and this evaluates the weights after a round; leave them "
            "out, or publish the round first"
        )
    holdout = _holdout(arguments.holdout, run)
    from server import results

    result: Mapping[str, Any] = results.evaluate(run, holdout, arguments.round)
    if arguments.json:
        print_json(result)
        return 0
    from server.status import holdout_table, output

    output().print(holdout_table(result.get("holdout", result)))
    return 0


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); give another --csv") from error


def _publish(arguments: argparse.Namespace) -> int:
    if arguments.coordinator is not None:
        return publish_remote(arguments)
    if arguments.without_holdout and arguments.holdout is not None:
        raise UsageError("--holdout and --without-holdout contradict each other; leave out one of them")
    run = newest_run(arguments.run)
    study = run.read_study()
    wanted = not arguments.without_holdout and (study.evaluation.holdout or arguments.holdout is not None)
    holdout = _holdout(arguments.holdout, run) if wanted else None
    from server import results

    old_holdout = None if arguments.old_holdout is None else _existing(arguments.old_holdout, "--old-holdout")
    identity = arguments.identity or run.identity / "coordinator"
    result: Mapping[str, Any] = results.publish(
        run, holdout, arguments.round, old_holdout, identity=identity, explain=arguments.explain
    )
    if arguments.json:
        print_json(result)
        return 0
    from server.status import output, variants_table

    publication = result.get("publication", result)
    output().print(variants_table(publication))
    if continual := result.get("continual"):
        from server.continual import continual_table

        output().print(continual_table(continual))
    print(f"\nThe model lies in {publication.get('folder')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
