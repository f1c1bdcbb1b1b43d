"""The identity that a site shows to its coordinator: renewed, unreadable, over."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import pytest

from client import agent
from common.errors import IdentityError
from common.security.certificates import Identity
from tests.client.stand_ins import (
    PATIENCE,
    Coordinator,
    Running,
    Worker,
    eventually,
)


def test_a_renewed_certificate_is_taken_when_the_site_dials_next(
    start: Callable[..., Coordinator], identities: dict[str, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[Identity] = []
    current = [identities["alpha"]]
    credentials = agent.channel_credentials

    def noted(identity: Identity) -> Any:
        dialled.append(identity)
        return credentials(identity)

    monkeypatch.setattr(agent, "channel_credentials", noted)
    first = start()
    site = Running(first.address, current[0], Worker(), renewed=lambda: current[0])
    eventually(lambda: site.state() == "connected")
    current[0] = identities["renewed"]
    assert dialled == [identities["alpha"]]  # it goes on over its line
    first.stop()
    start(first.address.port)
    eventually(lambda: site.state() == "connected" and len(dialled) > 1)
    site.stop()
    assert set(dialled[1:]) == {identities["renewed"]}
    assert site.said("certificate_expires") == identities["renewed"].not_after.timestamp()


def test_an_identity_that_cannot_be_read_for_a_while_ends_no_site(
    start: Callable[..., Coordinator], identities: dict[str, Identity]
) -> None:
    asked: list[int] = []

    def unreadable() -> Identity:
        asked.append(1)
        raise IdentityError("north: cannot be read (No such file or directory); check its rights")

    site = Running(start().address, identities["alpha"], Worker(), renewed=unreadable)
    eventually(lambda: site.state() == "connected")
    site.stop()
    assert asked


def test_an_identity_that_ended_and_has_no_successor_ends_the_site(
    start: Callable[..., Coordinator], identities: dict[str, Identity]
) -> None:
    def ended() -> Identity:
        raise IdentityError("north: the certificate expired; ask for a new invitation")

    over = dataclasses.replace(identities["alpha"], not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    site = Running(start().address, over, Worker(), renewed=ended)
    assert isinstance(site.end.exception(PATIENCE), IdentityError)
