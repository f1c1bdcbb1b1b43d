"""`wardround-site review`, `approve`, `reject` and `policy`: what may run at this site, decided by its operator."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.places import POLICY_VARIABLE, Place, add_policy_option, command_text, places, policy_path, require_utf8
from common.errors import PolicyError, PolicyFileError, RunFolderError, UsageError
from common.study import Study, load_study

if TYPE_CHECKING:
    from client.approvals import Decision, Subject
    from client.review import Review

_POLICY_HERE = Path("policy.yaml")


def add_approval_commands(commands: Any) -> None:
    """Adds the sub-commands to those of `wardround-site` (what `add_subparsers` returned)."""
    review = commands.add_parser(
        "review",
        help="what a study would do at this site, in plain words",
        description="Shows what a study would run here, on which data, what leaves and what does not, and whether this "
        "site's policy allows it. It connects to nobody, reads no image and changes nothing.",
    )
    _add_study(review, data=True)
    review.add_argument("--plan", action="store_true", help="compile the plan and show its digest, which takes seconds")
    review.set_defaults(handler=_review)

    approve = commands.add_parser(
        "approve",
        help="allow a study to run at this site",
        description="Shows the review and records that the study may run here, with this package and on this data. A "
        "changed study or package needs approval again. Several sites on one machine may be given at once.",
    )
    _add_study(approve, data=True)
    _add_decision(approve)
    approve.set_defaults(handler=lambda options: _decide("approve", options), plan=False)

    reject = commands.add_parser(
        "reject",
        help="forbid a study at this site",
        description="Records that the study may not run here, with whatever package. A site that runs ends before its "
        "next task.",
    )
    _add_study(reject, data=False)
    _add_decision(reject)
    reject.set_defaults(handler=lambda options: _decide("reject", options), plan=False)

    policy = commands.add_parser("policy", help="what this site lets any study ask of it", description=__doc__)
    actions = policy.add_subparsers(dest="action", required=True, metavar="ACTION")
    file_help = f"the policy file (default: ${POLICY_VARIABLE}, or {_POLICY_HERE} here)"
    show = actions.add_parser("show", help="print the policy, every default filled in")
    check = actions.add_parser("check", help="say what is wrong with the policy file, and with a study by it")
    init = actions.add_parser("init", help="make a policy file to be changed")
    for each in (show, check, init):
        each.add_argument("file", type=Path, nargs="?", metavar="FILE", help=file_help)
    for each in (show, check):
        each.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--study", type=Path, metavar="STUDY", help="hold this study against the policy")
    show.set_defaults(handler=_policy_show)
    check.set_defaults(handler=_policy_check)
    init.set_defaults(handler=_policy_init)


def _add_study(parser: Any, *, data: bool) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY", help="the coordinator's study file")
    parser.add_argument("--site", action="append", metavar="NAME", help="this site's name (default: its certificate's)")
    if data:
        parser.add_argument(
            "--data", action="append", required=True, metavar="NAME|FOLDER",
            help="as for `start`: registered data sets (several separated by commas), or a folder of cases",
        )  # fmt: skip
        parser.add_argument("--registry", type=Path, metavar="FILE", help="where data sets are registered")
        parser.add_argument("--coordinator", metavar="HOST:PORT", help="where the site will dial; held to the policy")
    parser.add_argument(
        "--work", action="append", type=Path, metavar="DIR",
        help="as for `start`: this site's own folder, where decisions are recorded (default: wardround-SITE)",
    )  # fmt: skip
    parser.add_argument(
        "--identity", action="append", type=Path, metavar="DIR",
        help="folder with this site's certificate; its signing.key, where it has one, signs decisions",
    )  # fmt: skip
    add_policy_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_decision(parser: Any) -> None:
    parser.add_argument("--by", required=True, type=_name, metavar="NAME", help="who decides; recorded")
    parser.add_argument("--note", default="", metavar="TEXT", help="why; recorded")


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a name, found {text!r}")
    return text.strip()


def _review(options: argparse.Namespace) -> int:
    study = load_study(options.study)
    reviews = [_review_of(options, study, place) for place in places(options)]
    if options.json:
        content = [review.to_json() for review in reviews]
        print(json.dumps(content[0] if len(content) == 1 else content))
    else:
        print("\n\n".join(review.to_text() for review in reviews))
    return PolicyError.exit_code if any(review.violations for review in reviews) else 0


def _review_of(options: argparse.Namespace, study: Study, place: Place) -> Review:
    from client.approvals import Approvals, Subject
    from client.package import installed_package
    from client.policy import PolicyOfFile, read_policy
    from client.review import data_of, make_review
    from common.wire.channel import parse_address

    if place.site and place.site not in study.cohort.sites:
        raise UsageError(
            f"site {place.site}: not in the study's cohort ({', '.join(study.cohort.sites)}); correct --site or "
            "--identity"
        )
    data = data_of(place.data, options.registry) if place.data is not None else None
    path, required = policy_path(options.policy, place.work)
    dialled = getattr(options, "coordinator", None)
    return make_review(
        Subject(place.site or "(not said)", study, installed_package(), data.names if data else ""),
        options.study,
        data=data,
        policy=read_policy(path, required=required) if path else PolicyOfFile(),
        coordinator=parse_address(dialled).host if dialled else None,
        approvals=Approvals(place.work, place.identity) if place.work else None,
        compile_plan=options.plan,
    )


def _decide(decision: Decision, options: argparse.Namespace) -> int:
    from client.approvals import Approvals
    from client.policy import violations_text

    study = load_study(options.study)
    found = places(options)
    require_utf8("--note", options.note)
    if any(not place.site for place in found):
        raise UsageError(f"{decision}: nothing says which site this is; give --identity or --site")
    reviews = [_review_of(options, study, place) for place in found]
    for place, review in zip(found, reviews, strict=True):
        if decision == "approve" and review.violations:  # before anything is recorded for any site
            points = "; ".join(violations_text(list(review.violations)))
            raise PolicyError(
                f"{place.site}: study {study.name} violates this site's policy, so it was not approved: {points} "
                f"({review.policy.path}); ask whoever runs the study to change it, or change the policy"
            )
    results = []
    for place, review in zip(found, reviews, strict=True):
        assert place.work is not None, "a site with a name has a work folder"
        approvals = Approvals(place.work, place.identity)
        if decision == "reject" and not place.work.is_dir():
            print(
                f"warning: {place.work}: no site has worked here; a site that runs with another --work is not reached "
                "by this rejection: reject it there",
                file=sys.stderr,
            )
        if decision == "approve":
            _record_in_audit_log(decision, place, review.subject, options.by)
        record = approvals.record(decision, review.subject, by=options.by, note=options.note, shown=review.to_json())
        if decision == "reject":  # which holds, whatever is the matter with the log
            _record_in_audit_log(decision, place, review.subject, options.by)
        results.append({"site": place.site, "file": str(approvals.path), **record.content})
        if options.json:
            continue
        done = "approved" if decision == "approve" else "rejected"
        if decision == "approve":
            print(review.to_text(), end="\n\n")
        print(f"{place.site}: study {study.name} is {done} by {options.by}.")
        signed = "signed by this site's identity" if approvals.signs else "not signed: the identity has no signing.key"
        print(f"Recorded in {approvals.path}, line {record.number}, {signed}.")
        if decision == "approve":
            start = command_text("start", options.study, place, "--coordinator HOST:PORT", policy=options.policy)
            print(f"Next: {start}")
    if options.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    return 0


def _record_in_audit_log(decision: Decision, place: Place, subject: Subject, by: str) -> None:
    """Raises RunFolderError where the site's log cannot be written."""
    from common.security.audit import AuditLog
    from common.security.signing import signer_in

    assert place.work is not None, "a site with a name has a work folder"
    signer = signer_in(place.identity) if place.identity is not None else None
    with contextlib.closing(AuditLog(place.work, f"site {place.site}", signer)) as audit:
        audit.record(
            "approved" if decision == "approve" else "rejected",
            study=subject.study.name,
            study_sha256=subject.study_digest,
            package_sha256=subject.package.digest,
            by=by,
        )
        audit.sign_head()


# The policy. -------------------------------------------------------------------------------------------------------


def _policy_file(options: argparse.Namespace) -> Path:
    path, _ = policy_path(options.file, None)
    return path or _POLICY_HERE


def _policy_show(options: argparse.Namespace) -> int:
    from client.policy import as_json, read_policy

    found = read_policy(_policy_file(options), required=True)
    print(json.dumps(as_json(found.policy)) if options.json else found.policy.to_yaml().rstrip("\n"))
    return 0


def _policy_check(options: argparse.Namespace) -> int:
    from client.policy import Proposal, read_policy, study_violations, violations_text
    from common.network_sizes import size_of

    found = read_policy(_policy_file(options), required=True)
    violations: list[str] = []
    if options.study:
        study = load_study(options.study)
        sizes = {"train": size_of(study).update_bytes}
        violations = violations_text(study_violations(found.policy, Proposal(study, bytes_up=sizes)))
    if options.json:
        print(json.dumps({"file": str(found.path), "digest": found.digest, "violations": violations}))
    elif not options.study:
        print(f"{found.path}: a policy without faults")
    elif not violations:
        print(f"{found.path}: the study violates no point of it, as far as that is known without this site's data")
    else:
        print(f"{found.path}: the study violates it:")
        for each in violations:
            print(f"  {each}")
    return PolicyError.exit_code if violations else 0


def _policy_init(options: argparse.Namespace) -> int:
    from client.policy import TEMPLATE

    path = _policy_file(options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise PolicyFileError(f"{path}: there is a file already; change that one, or give another name") from None
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); give another place") from error
    print(f"{path}: change it, then check it with `wardround-site policy check {path}`")
    return 0
