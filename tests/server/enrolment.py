"""A study with an authority, and its enrolment and renewals on real ports, in the loop of another thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from common.security.audit import AuditLog
from common.security.certificates import create_authority, issue, load_identity
from common.security.profile import Role
from common.security.revocation import RevocationFile, revoke
from common.security.signing import load_signer
from common.security.tokens import Token
from common.wire.channel import Address
from server.enrolment import Attempts, EnrolmentServer
from server.invitations import Issuer, Register

HOUR = 3600.0


class Study:
    """An authority and a coordinator in a folder."""

    def __init__(self, folder: Path, name: str = "nuclei") -> None:
        self.name = name
        self.authority, self.coordinator = folder / "authority", folder / "coordinator"
        create_authority(self.authority, name)
        issue(self.coordinator, self.authority, "coordinator", "coordinator", ["localhost", "127.0.0.1"])
        self.port = 0
        self.renewals = 0
        self.now = time.time()  # the clock of the one who issues

    @property
    def authority_pem(self) -> bytes:
        return (self.authority / "ca.crt").read_bytes()

    @property
    def pin(self) -> bytes:
        return x509.load_pem_x509_certificate(self.authority_pem).fingerprint(hashes.SHA256())

    @property
    def revoked(self) -> RevocationFile:
        return RevocationFile(self.coordinator, self.authority_pem)

    def invite(self, name: str = "north", role: Role = "site", hours: float = 1.0) -> Token:
        created = self.now
        token = Token.new(self.name, role, name, f"localhost:{self.port}", self.pin, int(created + hours * HOUR))
        register = Register(self.authority)
        register.add(token, created)
        register.close()
        return token

    def revoke(self, name: str, role: Role = "site", reason: str = "") -> None:
        revoke(self.revoked, load_signer(self.coordinator), role, name, reason, self.now)

    def events(self) -> list[str]:
        """What the audit log of the authority has."""
        from common.security.audit_check import check_log

        return [entry.event for entry in check_log(self.authority).entries]

    @contextlib.contextmanager
    def serving(self, attempts: Attempts | None = None) -> Iterator[None]:
        """Serves enrolment and renewals meanwhile."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        audit = AuditLog(self.authority, "coordinator", load_signer(self.coordinator))
        issuer = Issuer(self.authority, self.revoked, load_signer(self.coordinator), audit, clock=lambda: self.now)
        server = EnrolmentServer(issuer, load_identity(self.coordinator), attempts)

        def do(coroutine: object) -> object:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)  # type: ignore[arg-type]

        try:
            ports = do(server.start(Address("127.0.0.1", self.port), Address("127.0.0.1", self.renewals)))
            self.port, self.renewals = ports.enrolment, ports.renewals  # type: ignore[attr-defined]
            yield
        finally:
            do(server.stop(0.1))
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
            audit.close()
            issuer.register.close()
