"""How a run's page is to be served: open on loopback, by TLS and with a login elsewhere."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from common.errors import UsageError
from common.security.certificates import CERTIFICATE, KEY, load_identity
from common.security.pem_files import AUTHORITY_CERTIFICATE, read_certificate
from common.security.profile import hosts_of
from common.security.revocation import RevocationFile
from common.webpage.guard import LOOPBACK
from common.webpage.serving import tls_context
from common.wire.addresses import Address, is_loopback, parse_address
from server.dashboard.access import Access
from server.dashboard.app import Dashboard
from server.dashboard.tokens import PageTokens
from server.run_folder import RunFolder


@dataclass(frozen=True)
class Page:
    """A page that is ready to be served."""

    app: web.Application
    address: Address
    tls: ssl.SSLContext | None
    started: Callable[[str], None]


def prepare(
    run: RunFolder, listen: str, *, identity: Path | None = None, hosts: Sequence[str] = (), login: bool = False
) -> Page:
    """The page of a run, as this address asks for it.

    Parameters
    ----------
    identity : the coordinator's, whose certificate is served with beyond loopback; None: that in the run.
    hosts : further names that the page is asked by, without port.
    login : asks for one on loopback too.

    Raises
    ------
    NetworkError, RunFolderError, IdentityError, UsageError : before anything listens.
    """
    address = parse_address(listen)
    run.read_study()
    names = set(LOOPBACK) | {_bracketed(host) for host in (*hosts, address.host)}
    tokens = PageTokens(run.path)
    if is_loopback(address.host):
        access = Access(tokens if login else None)
        return Page(Dashboard(run, access, names).served(), address, None, _say(run, "of this machine alone"))
    folder = identity or run.identity / "coordinator"
    owner = load_identity(folder)
    if owner.role != "coordinator":
        raise UsageError(f"{folder}: is of {owner.role} {owner.name!r}; give the coordinator's with --identity")
    tls = tls_context(folder / CERTIFICATE, folder / KEY, clients_of=folder / AUTHORITY_CERTIFICATE)
    _, certificate = read_certificate(folder / CERTIFICATE)
    names |= {_bracketed(host) for host in hosts_of(certificate)}
    access = Access(tokens, RevocationFile(folder, owner.authority))
    tokens.all()  # a file that cannot be read is told now
    return Page(Dashboard(run, access, names).served(), address, tls, _say(run, "with a login, or a certificate"))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _say(run: RunFolder, for_whom: str) -> Callable[[str], None]:
    def say(url: str) -> None:
        print(f"The page of {run.path}: {url} ({for_whom}); stop it with Ctrl-C", flush=True)

    return say
