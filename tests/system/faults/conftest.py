"""What the fault tests share: one zygote, and the undisturbed runs of their studies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.faults.arena import Bench


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench whose processes are gone at the end of the session."""
    made = Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()
