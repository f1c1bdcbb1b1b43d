"""A coordinator asked from another machine, by an investigator's or observer's identity. No TensorFlow here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import grpc

from common.errors import IdentityError, NetworkError, PublishError, UsageError, WardroundError
from common.security.certificates import load_identity
from common.wire import operation_pb2 as pb
from common.wire import operation_pb2_grpc as rpc
from common.wire.channel import (
    CHANNEL_OPTIONS,
    Address,
    channel_credentials,
    connection_refusal,
    connection_trouble,
    parse_address,
)
from server.publisher import NewVersion

_SECONDS: Final = 15.0


class Remote:
    """A coordinator's calls for investigators and observers; used in a `with` block.

    Parameters
    ----------
    coordinator : its address, host:port.
    identity : folder of an investigator's or observer's.

    Raises
    ------
    IdentityError : from every method: the identity cannot be used, is of another role, or was revoked.
    NetworkError : from every method: the coordinator cannot be reached, or is none of this version.
    """

    def __init__(self, coordinator: str, identity: Path) -> None:
        self._address = parse_address(coordinator)
        loaded = load_identity(identity)
        if loaded.role == "coordinator":
            raise IdentityError(
                f"{identity}: the identity is the coordinator's own; give an investigator's or observer's "
                "(`wardround invite NAME --role investigator`), or the run with --run where the coordinator runs"
            )
        self._channel = grpc.secure_channel(str(self._address), channel_credentials(loaded), options=CHANNEL_OPTIONS)
        self._stub = rpc.OperationStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def status(self) -> dict[str, Any]:
        """How the run stands, as far as this identity's role may see it."""
        with self._errors():
            status: dict[str, Any] = json.loads(next(self._stub.Status(pb.StatusRequest(), timeout=_SECONDS)).status)
            return status

    def statuses(self) -> Iterator[dict[str, Any]]:
        """As `status`, and again at each change until the run ends."""
        with self._errors():
            for reply in self._stub.Status(pb.StatusRequest(follow=True)):
                yield json.loads(reply.status)

    def rounds(self) -> list[Mapping[str, str]]:
        """The figures by round."""
        with self._errors():
            return [dict(reply.figures) for reply in self._stub.Rounds(pb.RoundsRequest(), timeout=_SECONDS)]

    def stop(self, reason: str) -> None:
        """Has the coordinator stop in good order. Raises UsageError where the reason is too long."""
        with self._errors():
            self._stub.Stop(pb.StopRequest(reason=reason), timeout=_SECONDS)

    def publish(self, round_number: int | None, *, explain: bool) -> NewVersion:
        """Has a round published; None: the best. Takes minutes. Raises PublishError where it cannot be."""
        with self._errors():
            reply = self._stub.Publish(pb.PublishRequest(round=round_number or 0, explain=explain))
            return NewVersion(reply.version, reply.round)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _failure(self._address, error) from error


def _failure(address: Address, error: Any) -> WardroundError:
    """What gRPC's error means to whoever asked."""
    code, details = error.code(), error.details() or ""
    said = f"the coordinator at {address}: {details}"
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return IdentityError(f"the coordinator at {address} refuses: {details}")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return PublishError(said)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return UsageError(said)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return NetworkError(said)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NetworkError(
            f"{address}: something answers there that is no coordinator of this version; check --coordinator"
        )
    return connection_refusal(address, details) or NetworkError(
        f"{connection_trouble(address, details or str(code))}; check --coordinator, or ask whoever runs it"
    )
