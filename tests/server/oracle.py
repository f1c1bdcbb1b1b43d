"""One study run three ways on the same files, for the tests that compare what they end in.

(a) `server.program` on TFF's own runtimes, (b) the plan's graphs in this process, (c) `wardround simulate`: a
coordinator and sites over gRPC with mutual TLS. All three read through the same `client.datasets`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tifffile

from client.datasets import SiteDataset
from client.selection import select_folder
from common.learning.graph import to_numpy
from common.learning.plan import StudyPlan
from common.study import Study
from server.program import Learning, Outcome, Releases, run_study
from server.state import FileStateManager, ModelReleaseManager

LARGEST_DIFFERENCE = 1e-6
"""Of any weight, between two ways."""


def write_sites(folder: Path, dimensions: int, cases: Mapping[str, int]) -> None:
    """Blobs on noise, of sizes that differ from case to case; so many `cases` of each site."""
    for number, (site, count) in enumerate(cases.items()):
        for kind in ("images", "labels"):
            (folder / site / kind).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([number, index])
            shape = tuple(int(size) for size in rng.integers(14, 26, size=dimensions))
            grid = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
            distance = sum((axis - size / 2) ** 2 for axis, size in zip(grid, shape, strict=True))
            label = (distance < 30).astype(np.uint8)
            image = (label * 90 + rng.integers(0, 60, size=shape)).astype(np.uint8)
            if dimensions == 2:
                tifffile.imwrite(folder / site / "images" / f"{index}.tif", image)
                tifffile.imwrite(folder / site / "labels" / f"{index}.tif", label)
            else:
                for kind, array in (("images", image), ("labels", label)):
                    path = folder / site / kind / f"{index}.nii.gz"
                    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.eye(4)), path)


class LocalSites:
    """The study's data, as the sites would draw it."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.sites = {
            site: SiteDataset(study, site, select_folder(study, folder / site)) for site in study.cohort.sites
        }

    def training(self, round_number: int) -> list[tf.data.Dataset]:
        """Without generators, which TFF's runtime cannot send to its worker."""
        return [
            in_memory(dataset.training(round_number), self.study.training.batch_size) for dataset in self.sites.values()
        ]

    def validation(self, round_number: int) -> list[tf.data.Dataset]:
        del round_number
        return [in_memory(dataset.validation(), 1) for dataset in self.sites.values()]


def in_memory(dataset: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """The same examples, of one size, as one array, which TFF's runtime can send to its worker."""
    images, labels = (np.concatenate(part) for part in zip(*dataset.as_numpy_iterator(), strict=True))
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size)


class _NativeSource(tff.program.FederatedDataSource):
    """The same draws for TFF's own runtime, a round a selection."""

    def __init__(self, draw: Callable[[int], list[tf.data.Dataset]], federated_type: tff.FederatedType) -> None:
        self._draw = draw
        self._type = federated_type

    @property
    def federated_type(self) -> tff.FederatedType:
        return self._type

    def iterator(self) -> tff.program.FederatedDataSourceIterator:
        return _NativeIterator(self._draw, self._type)


class _NativeIterator(tff.program.FederatedDataSourceIterator):
    def __init__(self, draw: Callable[[int], list[tf.data.Dataset]], federated_type: tff.FederatedType) -> None:
        self._draw = draw
        self._type = federated_type
        self._round = 0

    @property
    def federated_type(self) -> tff.FederatedType:
        return self._type

    def select(self, k: int | None = None) -> list[tf.data.Dataset]:
        self._round += 1
        return self._draw(self._round)

    def to_bytes(self) -> bytes:
        return bytes([self._round])

    @classmethod
    def from_bytes(cls, buffer: bytes) -> _NativeIterator:
        raise NotImplementedError("the oracle runs without a break")


def run_native(
    plan: StudyPlan, federation: LocalSites, folder: Path, context: Any = None
) -> tuple[Outcome, list[Mapping[str, Any]]]:
    """(a): the program on TFF's native runtime, or another context of it; its models lie in `folder / "models"`."""
    rows: list[Mapping[str, Any]] = []

    class Keep(tff.program.ReleaseManager):  # type: ignore[misc]
        async def release(self, value: Any, key: int) -> None:
            rows.append(value)

    for name in ("models", "state"):
        (folder / name).mkdir()
    train, evaluate = plan.train.process, plan.evaluate.process if plan.evaluate is not None else None
    assert evaluate is not None
    native = context or tff.backends.native.create_async_local_cpp_execution_context()
    with tff.framework.get_context_stack().install(tff.program.NativeFederatedContext(native)):
        outcome = asyncio.run(
            run_study(
                Learning(train, evaluate),
                training_data=_NativeSource(federation.training, train.next.type_signature.parameter[1]),
                validation_data=_NativeSource(federation.validation, evaluate.next.type_signature.parameter[1]),
                rounds=plan.study.training.rounds,
                classes=plan.study.task.foreground,
                states=FileStateManager(folder / "state"),
                releases=Releases([Keep()], ModelReleaseManager(folder / "models")),
            )
        )
    return outcome, rows


def run_plan(plan: StudyPlan, federation: LocalSites) -> Sequence[np.ndarray]:
    """(b): the plan's graphs, one after the other."""
    train = plan.train
    state = train.initialize()
    for number in range(1, plan.study.training.rounds + 1):
        broadcast = train.prepare(*state)
        total = train.zero()
        for dataset in federation.sites.values():
            train.accumulate(total, train.work(dataset.training(number), broadcast))
        leaves = train.update(state, train.report(*total))
        state = leaves[: len(state)]
    return to_numpy(state)[: len([spec for spec in train.broadcast if spec.shape])]


def run_processes(study: Study, folder: Path, *options: str, timeout: float = 300) -> Path:
    """(c): the command, with a process for every site unless `options` say otherwise; returns the run folder."""
    study_file = folder / "study.yaml"
    study_file.write_text(study.to_yaml())
    run = folder / "run"
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "simulate",
        str(study_file),
        "--data",
        str(folder / "data"),
        "--run",
        str(run),
        *options,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return run
