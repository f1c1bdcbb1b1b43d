"""An agent, its worker, and the stand-in for a coordinator that it dials."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from common.security.certificates import Identity, ensure_simulation_identities, issue, load_identity
from tests.client.stand_ins import Coordinator, Running, Worker


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("identities")
    ensure_simulation_identities(folder, "digits", ["alpha"], ["127.0.0.1"])
    issue(folder / "renewed", folder / "authority", "alpha", "site")
    return {
        "alpha": load_identity(folder / "sites" / "alpha"),
        "renewed": load_identity(folder / "renewed"),
        "coordinator": load_identity(folder / "coordinator"),
    }


@pytest.fixture
def start(identities: dict[str, Identity]) -> Iterator[Callable[..., Coordinator]]:
    made: list[Coordinator] = []

    def begin(port: int = 0) -> Coordinator:
        made.append(Coordinator(identities["coordinator"], port))
        return made[-1]

    yield begin
    for one in made:
        one.stop()


@pytest.fixture
def coordinator(start: Callable[..., Coordinator]) -> Coordinator:
    return start()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def site(coordinator: Coordinator, identities: dict[str, Identity], worker: Worker) -> Iterator[Running]:
    running = Running(coordinator.address, identities["alpha"], worker)
    yield running
    running.stop()
