"""What the fault tests share: the undisturbed runs of their studies."""

from __future__ import annotations

import pytest

from tests.system.faults.arena import Bench
from tests.system.zygote import Zygote


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Bench:
    """A bench whose processes are gone at the end of the session."""
    return Bench(tmp_path_factory.mktemp("faults"), zygote)
