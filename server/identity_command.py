"""`wardround init`, `invite`, `enrolment` and `revoke`: a study's authority, and who belongs to the study."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import print_json
from common.errors import IdentityError, UsageError
from common.study import load_study
from common.watching.logs import set_up_logs
from common.wording import counted

if TYPE_CHECKING:
    from common.security.audit import AuditLog
    from common.security.profile import Role
    from common.security.signing import Signer

ENROLMENT_PORT = 8444
RENEWALS_PORT = 8445
_WEEK = 7 * 24.0
_MOST_HOURS = 90 * 24.0


def add_identity_commands(commands: Any) -> None:
    """Adds the sub-commands to those of `wardround` (what `add_subparsers` returned)."""
    init = commands.add_parser(
        "init",
        help="make a study's authority and the coordinator's identity",
        description="Makes the authority of a study, by whose certificates its members know each other, and the "
        "coordinator's identity. What is there already stays as it is.",
    )
    init.add_argument("study", type=Path, metavar="STUDY", help="study file")
    init.add_argument("--out", type=Path, metavar="DIR", default=Path("identities"), help="(default: %(default)s)")
    init.add_argument(
        "--host",
        action="append",
        metavar="HOST",
        default=[],
        help="name or address at which the sites reach the coordinator; may be repeated",
    )
    init.add_argument(
        "--enrolment", metavar="HOST:PORT", help=f"where sites enrol (default: the first --host, port {ENROLMENT_PORT})"
    )
    init.add_argument("--renew", action="store_true", help="new keys and certificates for the coordinator, in place")
    init.add_argument("--json", action="store_true", help="print the result as JSON")
    init.set_defaults(run_subcommand=_init)

    invite = commands.add_parser(
        "invite",
        help="invite a site to a study: prints a token, good once",
        description="Prints a token by which a site, or with --role somebody else, enrols once, until it expires: "
        "`wardround-site enrol TOKEN`. Its private keys are made there and never leave it.",
    )
    invite.add_argument("name", metavar="NAME", help="of the site, as in the study")
    invite.add_argument(
        "--role",
        choices=("site", "investigator", "observer"),
        default="site",
        help="site: trains; investigator: starts, stops, publishes; observer: reads metrics (default: %(default)s)",
    )
    invite.add_argument(
        "--hours", type=_hours, default=_WEEK, metavar="H", help="until it expires (default: %(default)g, a week)"
    )
    invite.add_argument("--address", metavar="HOST:PORT", help="where to enrol (default: what `init` was told)")
    _add_places(invite)
    invite.add_argument("--json", action="store_true", help="print the result as JSON")
    invite.set_defaults(run_subcommand=_invite)

    enrolment = commands.add_parser(
        "enrolment",
        help="serve those who were invited, and renewals, until stopped",
        description="Serves those who were invited, and renewals. The only process that needs the authority's key: run "
        "it while somebody is to enrol or to renew.",
    )
    enrolment.add_argument(
        "--listen", metavar="HOST:PORT", default=f"127.0.0.1:{ENROLMENT_PORT}", help="(default: %(default)s)"
    )
    enrolment.add_argument(
        "--renewals", metavar="HOST:PORT", help=f"(default: the host of --listen, port {RENEWALS_PORT})"
    )
    _add_places(enrolment)
    enrolment.set_defaults(run_subcommand=_enrolment)

    revoke = commands.add_parser(
        "revoke",
        help="shut a site out of a study, at once",
        description="Shuts a site, or with --role somebody else, out of a study: every certificate that it has is "
        "refused from now on, and a coordinator that runs cuts its connections within a second.",
    )
    revoke.add_argument("name", metavar="NAME", help="of the site")
    revoke.add_argument("--role", choices=("site", "investigator", "observer"), default="site")
    revoke.add_argument("--reason", default="", metavar="TEXT", help="told to the site, and recorded")
    revoke.add_argument("--run", type=Path, metavar="DIR", help="run folder, whose identity is taken where it has one")
    _add_places(revoke)
    revoke.add_argument("--json", action="store_true", help="print the result as JSON")
    revoke.set_defaults(run_subcommand=_revoke)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--identities",
        type=Path,
        metavar="DIR",
        default=Path("identities"),
        help="what `init` made: holds authority/ and coordinator/ (default: %(default)s)",
    )
    parser.add_argument("--ca", type=Path, metavar="DIR", help="the authority (default: authority/ in --identities)")
    parser.add_argument(
        "--identity", type=Path, metavar="DIR", help="the coordinator's (default: coordinator/ in --identities)"
    )


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MOST_HOURS or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected hours above 0 and up to {_MOST_HOURS:g}, found {text!r}")
    return value


def _authority(arguments: argparse.Namespace) -> Path:
    ca: Path = arguments.ca or arguments.identities / "authority"
    if not (ca / "ca.crt").exists():
        raise IdentityError(f"{ca}: no authority here; make one with `wardround init`, or give its folder with --ca")
    return ca


def _identity(arguments: argparse.Namespace) -> Path:
    identity: Path = arguments.identity or arguments.identities / "coordinator"
    return identity


def _log_of(authority: Path, signer: Signer | None) -> AuditLog:
    from common.security.audit import AuditLog
    from server.run_folder import COORDINATOR

    return AuditLog(authority, COORDINATOR, signer)


# init. -------------------------------------------------------------------------------------------------------------


def _init(arguments: argparse.Namespace) -> int:
    from common.security.certificates import CERTIFICATE, create_authority, issue
    from common.security.pem_files import AUTHORITY_CERTIFICATE, read_certificate
    from common.security.profile import hosts_of, study_of
    from common.security.rotation import NEXT, commit_rotation, discard_next
    from common.security.signing import load_signer
    from common.wire.channel import parse_address
    from server.invitations import Register

    study = load_study(arguments.study)
    authority, coordinator = arguments.out / "authority", arguments.out / "coordinator"
    exists = (coordinator / CERTIFICATE).exists()
    if not exists and not arguments.host:
        raise UsageError("--host: give the name or address at which the sites reach the coordinator")
    if (authority / AUTHORITY_CERTIFICATE).exists():
        found = study_of(read_certificate(authority / AUTHORITY_CERTIFICATE)[1])
        if found != study.name:
            raise IdentityError(
                f"{authority}: is the authority of study {found!r}, and the study file says {study.name!r}; choose "
                "another --out"
            )
        made = False
    else:
        create_authority(authority, study.name)
        made = True
    hosts = list(arguments.host)
    if exists:
        before = hosts_of(read_certificate(coordinator / CERTIFICATE)[1])
        missing = [host for host in hosts if host.lower() not in [name.lower() for name in before]]
        if missing and not arguments.renew:
            raise IdentityError(
                f"{coordinator}: its certificate is not for {', '.join(missing)}; run the same command with --renew, "
                "which gives the coordinator new keys and certificates in place. The sites' stay good"
            )
        hosts = [*before, *missing]
    if exists and arguments.renew:
        discard_next(coordinator)
        issue(coordinator / NEXT, authority, "coordinator", "coordinator", hosts)
        commit_rotation(coordinator)
    elif not exists:
        issue(coordinator, authority, "coordinator", "coordinator", hosts)
    register = Register(authority)
    address = arguments.enrolment or register.setting("address") or _with_port(hosts[0], ENROLMENT_PORT)
    parse_address(address)
    with register.changing():
        register.set("address", address)
        register.set("sites", list(study.cohort.sites))
    audit = _log_of(authority, load_signer(coordinator))
    if made:
        audit.record("authority-made", study=study.name)
    if made or not exists or arguments.renew:
        audit.record("coordinator-certified", hosts=hosts)
    audit.sign_head()
    audit.close()
    if arguments.json:
        print_json(
            {"study": study.name, "authority": str(authority), "coordinator": str(coordinator), "enrolment": address}
        )
        return 0
    print(f"the authority    {authority}\nthe coordinator  {coordinator}, for {', '.join(hosts)}")
    if exists and arguments.renew:
        print("\nThe coordinator has new keys and certificates. Restart it, and `wardround enrolment`.")
        return 0
    if exists and not made:
        print("\nBoth were here already, and stay as they are; --renew would make new keys for the coordinator.")
    where = "" if arguments.out == Path("identities") else f" --identities {arguments.out}"
    print(
        f"\n{authority / 'ca.key'} makes members of study {study.name}: back it up, and keep it from others. Only\n"
        "`wardround enrolment`, `invite` and `init` need it; the coordinator does not.\n\n"
        f"Next, for each of {', '.join(study.cohort.sites)}:\n  wardround invite {study.cohort.sites[0]}{where}\n"
        f"and, while they enrol at {address}:\n  wardround enrolment{where} --listen 0.0.0.0:{ENROLMENT_PORT}"
    )
    return 0


def _with_port(host: str, port: int) -> str:
    from common.wire.channel import Address

    return str(Address(host, port))


# invite. -----------------------------------------------------------------------------------------------------------


def _invite(arguments: argparse.Namespace) -> int:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from common.security.certificates import CERTIFICATE
    from common.security.pem_files import read_authority, read_certificate
    from common.security.profile import NAME, hosts_of, study_of
    from common.security.revocation import RevocationFile
    from common.security.signing import signer_in
    from common.security.tokens import Token
    from common.wire.channel import parse_address
    from server.invitations import Register

    authority, identity = _authority(arguments), _identity(arguments)
    pem, certificate, _ = read_authority(authority)
    name, role = str(arguments.name), _role(arguments.role)
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r}: expected up to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    register = Register(authority)
    sites: list[str] | None = register.setting("sites")
    if role == "site" and sites is not None and name not in sites:
        raise UsageError(
            f"{name}: not in the study's cohort ({', '.join(sites)}); correct the name, or run `wardround init` again "
            "with the study file that has it"
        )
    address = arguments.address or register.setting("address")
    if address is None:
        raise UsageError("--address: give where the site is to enrol, host:port; `wardround init` would keep it")
    host = parse_address(address).host
    signer = None
    if (identity / CERTIFICATE).exists():
        signer = signer_in(identity)
        coordinator: x509.Certificate = read_certificate(identity / CERTIFICATE)[1]
        if host.lower() not in [each.lower() for each in hosts_of(coordinator)]:
            raise UsageError(
                f"{address}: the coordinator's certificate is for {', '.join(hosts_of(coordinator))}, and who enrols "
                f"would refuse it; correct --address, or run `wardround init --renew --host {host}`"
            )
    now = time.time()
    revoked = RevocationFile(identity, pem).current().entries.get((role, name))
    holding = [
        until
        for serial, until in register.issued(role, name)
        if until > now and (revoked is None or serial in revoked.valid)
    ]
    if holding:
        raise IdentityError(
            f"{role} {name}: has certificates already, until {_day(max(holding))}; a second holder of the name would "
            f"be one too many. If it lost its keys, first `wardround revoke {name}{_flag('role', role, 'site')}`, "
            "then invite it again"
        )
    token = Token.new(
        study_of(certificate),
        role,
        name,
        address,
        certificate.fingerprint(hashes.SHA256()),
        int(now + arguments.hours * 3600),
    )
    audit = _log_of(authority, signer)
    audit.record("invited", member=f"{role} {name}", id=token.invitation.hex(), expires=token.expiry.isoformat())
    with register.changing():
        withdrawn = register.withdraw(role, name, now)
        register.add(token, now)
    audit.sign_head()
    audit.close()
    expires = f"{token.expiry:%Y-%m-%d %H:%M} UTC"
    if arguments.json:
        print_json(
            {
                "token": token.text(),
                "study": token.study,
                "role": role,
                "name": name,
                "address": address,
                "expires": token.expiry.isoformat(),
                "withdrawn": withdrawn,
            }
        )
        return 0
    where = "" if arguments.identities == Path("identities") else f" --identities {arguments.identities}"
    print(f"Invitation of {role} {name} to study {token.study}, good once, until {expires}:\n")
    print(token.text())
    print(
        "\nHand it over on a channel that you would trust with a password. There they run\n"
        "  wardround-site enrol TOKEN\n"
        f"while `wardround enrolment{where}` runs here, reached at {address}."
    )
    if withdrawn:
        print(f"The invitation of {name} from before is withdrawn.")
    return 0


def _role(word: str) -> Role:
    from common.security.profile import role_of

    role = role_of(word)
    assert role is not None, "argparse lets no other pass"
    return role


def _flag(name: str, value: str, default: str) -> str:
    return "" if value == default else f" --{name} {value}"


# enrolment. --------------------------------------------------------------------------------------------------------


def _enrolment(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from common.wire.channel import parse_address
    from server.enrolment import serve_enrolment

    authority, identity = _authority(arguments), _identity(arguments)
    renewals = arguments.renewals or _with_port(parse_address(arguments.listen).host, RENEWALS_PORT)
    set_up_logs()
    return serve_enrolment(authority, identity, arguments.listen, renewals)


# revoke. -----------------------------------------------------------------------------------------------------------


def _revoke(arguments: argparse.Namespace) -> int:
    from common.security.pem_files import AUTHORITY_CERTIFICATE, read_certificate
    from common.security.profile import study_of
    from common.security.revocation import RevocationFile, revoke
    from common.security.signing import load_signer
    from server.invitations import REGISTER, Register
    from server.run_folder import RunFolder

    identities: Path = arguments.identities
    sites: list[str] = []
    if arguments.run is not None:
        run = RunFolder(arguments.run)
        sites = list(run.read_study().cohort.sites)
        if arguments.identity is None and (run.identity / "coordinator").is_dir():
            identities = run.identity
    identity = arguments.identity or identities / "coordinator"
    authority = arguments.ca or identities / "authority"
    signer = load_signer(identity)
    if signer.role != "coordinator":
        raise IdentityError(f"{identity}: the identity is of {signer.role} {signer.name!r}; give the coordinator's")
    role, name, now = _role(arguments.role), str(arguments.name), time.time()
    register = Register(authority) if (authority / REGISTER).exists() else None
    if register is not None:
        sites += register.setting("sites") or []
    known = register is not None and bool(register.issued(role, name) or register.invitations(role, name))
    if not known and sites and (role != "site" or name not in sites):
        raise UsageError(f"{name}: there is no such {role} ({_names(sites) if role == 'site' else 'none was invited'})")
    file = RevocationFile(identity, signer.authority)
    before = file.current().entries.get((role, name))
    entry = revoke(file, signer, role, name, arguments.reason, now)
    withdrawn = 0
    if register is not None:
        with register.changing():
            withdrawn = register.withdraw(role, name, now)
    logs = [authority] if (authority / AUTHORITY_CERTIFICATE).exists() else []
    for folder in [*logs, *([arguments.run] if arguments.run is not None else [])]:
        audit = _log_of(folder, signer)
        audit.record("revoked", member=f"{role} {name}", reason=entry.reason)
        audit.sign_head()
        audit.close()
    study = study_of(read_certificate(identity / AUTHORITY_CERTIFICATE)[1])
    if arguments.json:
        print_json(
            {
                "study": study,
                "role": role,
                "name": name,
                "at": entry.at,
                "reason": entry.reason,
                "withdrawn": withdrawn,
                "list": str(identity / "revoked.json"),
            }
        )
        return 0
    print(
        f"{role} {name} is shut out of study {study}: every certificate that it has is refused from now on.\n"
        "A coordinator that runs with this identity cuts its connections within a second; an update that was taken "
        "before stays in its round."
    )
    if before is not None:
        since = "; certificates issued since are refused with the others" * bool(before.valid)
        print(f"It was shut out before, on {_day(before.at)}{since}.")
    if withdrawn:
        print(f"{counted(withdrawn, 'open invitation')} withdrawn.")
    print(f"To let it in again: wardround invite {name}{_flag('role', role, 'site')}")
    return 0


def _names(sites: Sequence[str]) -> str:
    return f"the study has {', '.join(sorted(set(sites)))}"


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))
