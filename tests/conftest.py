"""Shared by all tests: what must be set before TensorFlow or gRPC load, and studies of the smallest useful size."""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator

import hypothesis
import pytest

import common  # noqa: F401  (sets what gRPC and TensorFlow read when they load; must come first)
from common.study import Study, parse_study
from common.watching.logs import set_up_logs

# A runner that was started in the background may ignore SIGINT, and its children inherit that; TFF ends its worker by
# this signal and then waits for ever. A handler here means the default there.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tensorflow() -> None:
    """TensorFlow with the one intra-op thread that the test studies ask for; loaded once."""
    from common.learning.runtime import configure_tensorflow

    configure_tensorflow(1)


@pytest.fixture(scope="session", autouse=True)
def _configure_what_is_loaded() -> None:
    """Test modules that import TensorFlow have loaded it by now; no operation has run yet."""
    if "tensorflow" in sys.modules:
        from common.learning.runtime import configure_tensorflow

        configure_tensorflow(1)


@pytest.fixture(autouse=True)
def _logs_untouched() -> None:
    """A command that a test or a fixture ran in this process has set up logs; its stream is closed by now."""
    for logger, level in ((logging.getLogger("wardround"), logging.NOTSET), (logging.getLogger(), logging.WARNING)):
        for handler in [each for each in logger.handlers if type(each).__module__ == set_up_logs.__module__]:
            logger.removeHandler(handler)
        logger.setLevel(level)
    logging.getLogger("wardround").propagate = True


@pytest.fixture(scope="session", autouse=True)
def _end_tff_workers() -> Iterator[None]:
    """TFF's native context starts a `worker_binary` that outlives a process that dies by an exception."""
    yield
    import psutil

    for child in psutil.Process().children(recursive=True):
        if "worker_binary" in child.name():
            child.kill()


TINY_STUDY = """
study: tiny
seed: 11
task:
  dimensions: {dimensions}
  channels: 1
  classes: [background, cell]
model: {{filters: 4, depth: {depth}, head: {head}, normalization: {normalization}}}
preprocessing:
  patch: {patch}
training:
  algorithm: {algorithm}
  {proximal}
  rounds: 2
  batch_size: 2
  patches_per_epoch: 6
  client_optimizer: {{name: {client}, learning_rate: {rate}}}
cohort:
  sites: [alpha, beta]
  deadline: 2m
evaluation:
  validation_fraction: 0.34
"""


@pytest.fixture(scope="session")
def tiny_study() -> Callable[..., Study]:
    """Makes a study with the smallest U-Net: `tiny_study(dimensions=3, algorithm="fedprox")`."""

    def make(
        *,
        dimensions: int = 2,
        depth: int = 2,
        algorithm: str = "fedavg",
        mu: float | None = None,
        head: str = "softmax",
        normalization: str = "weight",
        client: str = "sgd",
        rate: float = 0.01,
    ) -> Study:
        text = TINY_STUDY.format(
            dimensions=dimensions,
            depth=depth,
            head=head,
            normalization=normalization,
            patch=[16] * dimensions,
            algorithm=algorithm,
            proximal=f"proximal_mu: {mu}" if mu is not None else "",
            client=client,
            rate=rate,
        )
        return parse_study(textwrap.dedent(text))

    return make
