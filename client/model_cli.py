"""`wardround-site fetch` and `personalize`: getting a published model, and making it this site's own."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.places import add_policy_option, default_work, policy_path
from common.errors import IdentityError
from common.inference.trust import Trust, add_trust_options
from common.wording import counted, printable

if TYPE_CHECKING:
    from client.datasets import SiteDataset
    from common.security.signing import Signer
    from common.study import Study

_CACHE_BYTES = 20 * 10**9


def add_model_commands(commands: Any) -> None:
    """Adds the sub-commands to those of `wardround-site` (what `add_subparsers` returned)."""
    fetch = commands.add_parser(
        "fetch",
        help="bring a published model from the coordinator",
        description="Brings a published version from the coordinator to this site, whole or not at all, every file "
        "checked against its manifest, which the study's coordinator must have signed.",
    )
    fetch.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="where to dial")
    fetch.add_argument(
        "--identity", type=Path, required=True, metavar="DIR", help="folder with this site's certificate"
    )
    fetch.add_argument(
        "--study", default="", metavar="NAME", help="refuse any other study (default: whatever is served)"
    )
    fetch.add_argument("--version", default="", metavar="V", help="such as v3 (default: the newest)")
    fetch.add_argument("--out", type=Path, required=True, metavar="DIR", help="the version becomes a folder in here")
    fetch.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="this site's own folder, for its policy and its audit log (default: wardround-SITE)",
    )
    add_policy_option(fetch)
    add_trust_options(fetch, has_identity=True)
    fetch.add_argument("--json", action="store_true", help="print JSON")
    fetch.set_defaults(handler=_fetch)

    personalize = commands.add_parser(
        "personalize",
        help="fine-tune a published model on this site's own images",
        description="Fine-tunes a published model on this site's training cases, measures it before and after on its "
        "validation cases (both as in the study), and keeps the personal model only if it gained. Nothing leaves the "
        "site.",
    )
    personalize.add_argument("model", type=Path, metavar="MODEL", help="the folder of a published version")
    personalize.add_argument(
        "--data",
        required=True,
        metavar="NAME|FOLDER",
        help="registered data sets (several separated by commas), or a folder of cases",
    )
    personalize.add_argument("--registry", type=Path, metavar="FILE", help="where data sets are registered")
    personalize.add_argument("--out", type=Path, required=True, metavar="DIR", help="the personal model's folder, new")
    personalize.add_argument("--epochs", type=_positive, default=5, metavar="N", help="(default: %(default)s)")
    personalize.add_argument(
        "--rate", type=_share, default=0.1, metavar="R", help="times the study's learning rate (default: %(default)s)"
    )
    personalize.add_argument(
        "--identity", type=Path, metavar="DIR", help="folder with this site's certificate, whose key signs the result"
    )
    add_trust_options(personalize, has_identity=True)
    personalize.add_argument("--json", action="store_true", help="print JSON")
    personalize.set_defaults(handler=_personalize)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, found {text!r}")
    return value


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP (unless ignored, as under nohup) end the command as Ctrl-C does: nothing stays behind."""
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]

    def end(number: int, frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second one does not disturb the cleaning up
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fetch(options: argparse.Namespace) -> int:
    from client.fetch import fetch  # gRPC takes a while to load
    from client.policy import fetch_violations, read_policy, violations_text
    from common.errors import PolicyError
    from common.security.audit import NO_AUDIT, Audit, AuditLog
    from common.security.certificates import load_identity
    from common.security.signing import signer_in
    from common.wire.channel import parse_address

    address, identity = parse_address(options.coordinator), load_identity(options.identity)
    trust = Trust.of(options, options.identity)
    work = options.work or default_work(identity.name)
    path, required = policy_path(options.policy, work)
    assert path is not None, "a site has a work folder"
    policy = read_policy(path, required=required).policy

    def allow(study: str | None) -> None:
        if violations := fetch_violations(policy, address.host, study):
            points = "; ".join(violations_text(violations))
            raise PolicyError(
                f"this site's policy forbids it, so nothing was fetched: {points} ({path}); change the policy, or do "
                "without this model"
            )

    allow(options.study or None)
    audit: Audit = NO_AUDIT
    if options.work or work.is_dir():
        audit = AuditLog(work, f"site {identity.name}", signer_in(options.identity))
    else:  # a folder that was neither given nor is there keeps no site's log
        print(
            f"warning: no site has worked in {work}, so no policy was asked and the fetch is in no audit log; give the "
            "site's own folder with --work",
            file=sys.stderr,
        )
    audit.record("model-asked-for", study=options.study, version=options.version, coordinator=str(address))
    found = fetch(
        address, identity, options.out, study=options.study, version=options.version, verify=trust, allow=allow
    )
    if not found.was_here:
        audit.record("model-fetched", study=found.study, version=found.version, bytes=found.size)
    audit.sign_head()
    audit.close()
    trust.warn()
    if options.json:
        result = {
            "folder": str(found.folder),
            "study": found.study,
            "version": found.version,
            "bytes": found.size,
            "was_here": found.was_here,
            **trust.report(),
        }
        print(json.dumps(result))
    elif found.was_here:
        print(f"{printable(found.study)} {found.version} is here already, undamaged: {found.folder}")
    else:
        print(f"{printable(found.study)} {found.version}, {found.size / 1e6:.1f} MB: {found.folder}")
    return 0


def _own_signer(identity: Path | None) -> Signer | None:
    """Who signs a personal model; None where the site's identity is not given, or has no key that signs."""
    from common.security.signing import signer_in

    signer = signer_in(identity) if identity is not None else None
    if signer is not None and signer.role != "site":
        raise IdentityError(
            f"{identity}: the identity is of {signer.role} {signer.name!r}, and a personal model is signed by its "
            "site; give the folder of this site's identity"
        )
    return signer


def _personalize(options: argparse.Namespace) -> int:
    from client.data_selection import select
    from client.personalize import personalize, refuse_existing, report_of, tuning_study
    from common.inference.version_files import open_weights
    from common.learning.runtime import configure_tensorflow

    def progress(words: str) -> None:
        print(words, file=sys.stderr if options.json else sys.stdout, flush=True)

    # Whatever is wrong with the folders, the model and the images is told before TensorFlow is loaded.
    refuse_existing(options.out)
    trust = Trust.of(options, options.identity)
    published = open_weights(options.model, trust).study
    trust.warn()
    signer = _own_signer(options.identity)
    # Prepared images are those of patients: they go however this ends.
    with _ended_in_order(), tempfile.TemporaryDirectory(prefix="wardround-") as work:
        study = tuning_study(published, options.epochs, options.rate)
        cases = select(study, options.data, Path(work), options.registry)
        progress(f"{counted(len(cases.cases), 'case')} fit for {printable(published.name)}; loading TensorFlow")
        configure_tensorflow(published.training.threads)
        opened: list[SiteDataset] = []

        def open_cases(study: Study) -> SiteDataset:
            from client.case_cache import CaseCache
            from client.datasets import SiteDataset

            opened.append(SiteDataset(study, "personal", cases, CaseCache(Path(work) / "cache", _CACHE_BYTES)))
            return opened[-1]

        result = personalize(
            options.model, open_cases, epochs=options.epochs, rate=options.rate, progress=progress, verify=trust
        )
        if result.gained:
            from client.personal_version import write_personal

            write_personal(result, options.model, options.out, opened[-1], progress, signer, verify=trust)
    report = report_of(result, options.out if result.gained else None)
    if options.json:
        print(json.dumps(report))
        return 0
    print(
        f"Dice on {result.validation_cases} validation cases: {result.mean_before:.4f} before, "
        f"{result.mean_after:.4f} after {options.epochs} epochs on {result.training_cases} training cases"
    )
    for name in result.before if len(result.before) > 1 else ():
        print(f"  {name}: {result.before[name]:.4f} before, {result.after[name]:.4f} after")
    if result.gained:
        print(f"The personal model lies in {options.out}")
        if signer is None:
            print("It is not signed, as no --identity was given that can: `predict` takes it with --allow-unsigned")
    else:
        print("It did not gain, so it was not kept: go on with the published model")
    return 0
