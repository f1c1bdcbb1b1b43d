"""Where a process listens or is reached, as users write it. Imports nothing that takes time."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from common.errors import NetworkError


class Address(NamedTuple):
    """Where the coordinator listens or is reached; ``str()`` of it is what gRPC takes. IPv6 hosts have no brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Host and port of ``host:port`` (a DNS name or IPv4 address) or ``[IPv6]:port``.

    Port 0, a port that the system chooses, is for servers only. Raises NetworkError for anything else.
    """
    match = re.fullmatch(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^\[\]:/@\s]+)):(?P<port>[0-9]{1,5})", text, re.ASCII)
    if match is None or int(match["port"]) > 65535 or not _is_host(match["six"], match["host"]):
        raise NetworkError(
            f"address {text!r}: expected host:port, such as coordinator.example.org:8443 or [2001:db8::1]:8443; "
            "correct it"
        )
    return Address(match["six"] or match["host"], int(match["port"]))


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_host(six: str | None, host: str | None) -> bool:
    try:
        address = ipaddress.ip_address(six or host or "")
    except ValueError:
        if six is not None or host is None:
            return False
        labels = host.removesuffix(".").split(".")
        # A name of digits and dots alone that is no address is a mistyped address.
        return (
            len(host) <= 253
            and not labels[-1].isdecimal()
            and all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", label) for label in labels)
        )
    return address.version == (4 if six is None else 6)
