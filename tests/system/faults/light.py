"""`wardround-site start` with a light worker: the command as it is, but for data, plan and training.

A light site needs no images and no TensorFlow. What it sends is drawn from a hash of the study, the round, its name and
the broadcast: the same bits whenever it is asked the same, and other bits when anything before went wrong.

    light-site plan STUDY FILE     compiles the study (with TensorFlow) and writes what its light sites need to know
    light-site start ...           as `wardround-site start`, once it was approved; FAULTS_PLAN names that file
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.secure_aggregation.masking import InputSpec
from common.wire.tensors import Array, TensorSpec, encoded_size

BATCHES = 4


@dataclass(frozen=True)
class LightPlan:
    """What a light site knows of a study: its name, its plan's digest, what goes down and up, or into secure sums."""

    study: str
    digest: bytes
    broadcast: tuple[TensorSpec, ...]
    sent: tuple[TensorSpec, ...]
    secure: tuple[InputSpec, ...]

    @staticmethod
    def read(path: Path) -> LightPlan:
        """As `write_plan` wrote it."""
        content = json.loads(path.read_text())
        return LightPlan(
            content["study"],
            bytes.fromhex(content["digest"]),
            _specs(content["broadcast"]),
            _specs(content["sent"]),
            tuple(InputSpec(tuple(shape), bits) for shape, bits in content["secure"]),
        )


@dataclass(frozen=True)
class LightDataset:
    """What the command needs of a data set: there are no images, and no cache to empty."""

    site: str

    def make_room(self) -> int:
        """See `client.datasets.SiteDataset`."""
        return 0


class LightWorker:
    """A `client.work.Worker` that takes `seconds` for each of its batches and computes nothing in them."""

    training_cases = 1
    validation_cases = 0

    def __init__(self, plan: LightPlan, site: str, seconds: float = 0.0) -> None:
        self.digest = plan.digest
        self._plan = plan
        self._site = site
        self._seconds = seconds

    def expected(self, kind: str) -> Sequence[TensorSpec]:
        """See `client.work.Worker`."""
        return self._plan.broadcast

    def work(
        self, kind: str, round_number: int, broadcast: Sequence[Array], on_batch: Callable[[int, int], None]
    ) -> Sequence[Array]:
        """See `client.work.Worker`."""
        for batch in range(1, BATCHES + 1):
            on_batch(batch, BATCHES)
            time.sleep(self._seconds)
        return light_update(self._plan, self._site, round_number, broadcast)

    def cases(self, kind: str) -> int:
        """See `client.work.Worker`."""
        return 1


def light_update(plan: LightPlan, site: str, round_number: int, broadcast: Sequence[Array]) -> list[Array]:
    """What the site sends in the round: scalars are 1, tensors small and drawn from the hash of all that is given."""
    digest = hashlib.sha256(f"{plan.study}/{round_number}/{site}".encode())
    for tensor in broadcast:
        digest.update(tensor.tobytes())
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest()[:16], "big")))
    if plan.secure:  # whole numbers about the middle of their range; a single bit counts the sites
        return [
            np.ones(part.shape, spec.dtype)
            if part.bits == 1
            else (2 ** (part.bits - 1) + draw.integers(-(2**24), 2**24, part.shape)).astype(spec.dtype)
            for part, spec in zip(plan.secure, plan.sent, strict=True)
        ]
    return [
        (0.01 * draw.standard_normal(spec.shape, np.float32)).astype(spec.dtype)
        if spec.shape
        else np.ones((), spec.dtype)
        for spec in plan.sent
    ]


def write_plan(study_file: Path, path: Path) -> None:
    """Compiles the study and writes what `LightPlan` holds."""
    from common.learning.plan import build_plan
    from common.learning.runtime import configure_tensorflow
    from common.study import load_study

    study = load_study(study_file)
    configure_tensorflow(study.training.threads)
    plan = build_plan(study)
    content = {
        "study": study.name,
        "digest": plan.digest.hex(),
        "broadcast": [[spec.dtype, spec.shape] for spec in plan.train.broadcast],
        "sent": [[spec.dtype, spec.shape] for spec in plan.train.sent],
        "secure": [[spec.shape, spec.bits] for spec in plan.train.secure],
    }
    path.write_text(json.dumps(content))


def main(arguments: list[str]) -> int:
    """The command."""
    if arguments[0] == "plan":
        write_plan(Path(arguments[1]), Path(arguments[2]))
        return 0
    import client.cli
    import client.work
    import common.learning.runtime

    plan = LightPlan.read(Path(os.environ["FAULTS_PLAN"]))
    seconds = float(os.environ.get("FAULTS_BATCH_SECONDS", "0.02"))
    replaced: dict[Any, dict[str, Any]] = {
        common.learning.runtime: {"configure_tensorflow": lambda threads: None},
        client.cli: {"_dataset": lambda study, site, *rest: LightDataset(site)},
        client.work: {
            "site_plan": lambda study: plan,
            "secure_specs": lambda plan: {"train": plan.secure},
            "update_bytes": lambda plan: {"train": encoded_size(plan.sent)},
            "site_worker": lambda plan, dataset, folder, **options: LightWorker(plan, dataset.site, seconds),
        },
    }
    for module, names in replaced.items():
        for name, value in names.items():
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)
    return client.cli.main(arguments)


def _specs(entries: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(dtype, tuple(shape)) for dtype, shape in entries)
