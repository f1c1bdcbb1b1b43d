"""A coordinator and raw or real sites on this machine, without training."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from client.agent import Agent
from common.security.certificates import Identity, ensure_simulation_identities, issue, load_identity
from tests.server.service.digits import (
    PATIENCE,
    SITES,
    Coordinator,
    Site,
    Worker,
)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """The coordinator's and the sites', and that of `delta`, whom the authority knows but the study does not."""
    folder = tmp_path_factory.mktemp("identities")
    sites = [*SITES, "delta"]
    ensure_simulation_identities(folder, "digits", sites, ["127.0.0.1"])
    found = {site: load_identity(folder / "sites" / site) for site in sites}
    for role in ("observer", "investigator"):
        issue(folder / role, folder / "authority", "alpha", role)  # type: ignore[arg-type]
        found[role] = load_identity(folder / role)
    return found | {"coordinator": load_identity(folder / "coordinator")}


@pytest.fixture
def started(
    loop: asyncio.AbstractEventLoop, identities: dict[str, Identity], tmp_path: Path
) -> Iterator[Callable[..., Coordinator]]:
    """Starts coordinators on one folder, one after the other."""
    made: list[Coordinator] = []

    def make(port: int = 0) -> Coordinator:
        made.append(Coordinator(loop, tmp_path, identities["coordinator"], port))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(sqlite3.Error):
            one.stop()


@pytest.fixture
def coordinator(started: Callable[..., Coordinator]) -> Coordinator:
    return started()


@pytest.fixture
def connect(identities: dict[str, Identity]) -> Iterator[Callable[..., Site]]:
    """Opens a raw channel to a coordinator as one of the sites."""
    made: list[Site] = []

    def make(coordinator: Coordinator, name: str) -> Site:
        made.append(Site(coordinator, name, identities[name]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def alpha(coordinator: Coordinator, connect: Callable[..., Site]) -> Site:
    return connect(coordinator, "alpha")


@pytest.fixture
def beta(coordinator: Coordinator, connect: Callable[..., Site]) -> Site:
    return connect(coordinator, "beta")


@pytest.fixture
def gamma(coordinator: Coordinator, connect: Callable[..., Site]) -> Site:
    return connect(coordinator, "gamma")


@pytest.fixture
def run(identities: dict[str, Identity], tmp_path: Path) -> Iterator[Callable[..., Future[str]]]:
    """Runs an agent in a thread; the future holds what its `run` returns or raises."""
    agents: list[tuple[Agent, Future[str]]] = []

    def begin(coordinator: Coordinator, site: str, worker: Worker) -> Future[str]:
        folder = tmp_path / "work" / f"{site}-{len(agents)}"
        agent = Agent("digits", site, worker, coordinator.address, identities[site], folder)
        end: Future[str] = Future()
        agents.append((agent, end))

        def body() -> None:
            try:
                end.set_result(agent.run())
            except BaseException as error:
                end.set_exception(error)

        threading.Thread(target=body, daemon=True).start()
        return end

    yield begin
    for agent, _ in agents:
        agent.stop()
    for _, end in agents:
        end.exception(PATIENCE)
