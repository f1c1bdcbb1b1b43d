"""The coordinator's holdout: a folder of labelled images, segmented whole and compared with their labels.

The same measure serves a round's weights, run by TensorFlow, and a published file, run by LiteRT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.imaging.case import Case
from common.imaging.checks import Requirements, examine_case
from common.imaging.discovery import discover
from common.imaging.geometry import spacing_of, to_ras
from common.imaging.grid import Grid
from common.imaging.loading import read_case
from common.imaging.preprocessing import prepare_case, prepare_label
from common.imaging.sliding_window import Predict, predict_tiled
from common.inference.instances import instances_of
from common.inference.lite import class_indices
from common.inference.restoring import restored_slabs
from common.metrics.calibration import count_calibration, predicted_confidence
from common.metrics.instances import match_instances
from common.metrics.overlap import OverlapCounts, count_overlap
from common.metrics.surface import measure_surfaces
from common.study import Study
from server.evaluation.detailed import CaseDetail, DetailedResult
from server.evaluation.result import HoldoutResult
from server.watching.samples import Sampler

_CACHE_BYTES = 2**30
_ROWS = 32
"""So many rows of probabilities are brought to the stored grid at a time, where they may take far more memory."""
_Measure = TypeVar("_Measure")
_Voxel = TypeVar("_Voxel", bound=np.generic)


class HoldoutCase(NamedTuple):
    """A case of a holdout.

    Attributes
    ----------
    image : float32, (spatial..., channel), prepared as for training.
    label : uint8 class indices, (z, y, x), on the grid as stored, turned to RAS in 3D.
    grid : the way back from the prepared grid.
    spacing : of `label`, (z, y, x): millimetres, micrometres for microscopy, 1.0 where the file does not say.
    instances : int32, as `label`, the stored number of every object, 0 for background; None where the study's labels
        are classes.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]
    grid: Grid
    spacing: tuple[float, float, float]
    instances: npt.NDArray[np.int32] | None

    @property
    def nbytes(self) -> int:
        """The size of the arrays."""
        return self.image.nbytes + self.label.nbytes + (0 if self.instances is None else self.instances.nbytes)

    def restored(
        self, probabilities: npt.NDArray[np.float32]
    ) -> Iterator[tuple[tuple[slice, slice, slice], npt.NDArray[np.float32]]]:
        """Probabilities on the prepared grid, brought to where `label` is as `predict` does: see `restored_slabs`."""
        length = len(probabilities)
        parts = (slice(first, min(first + _ROWS, length)) for first in range(0, length, _ROWS))
        return restored_slabs(((part, probabilities[part]) for part in parts), self.grid)


class Holdout:
    """The cases of a holdout folder, prepared as for training. Safe to use from several threads.

    Parameters
    ----------
    study : Study
    folder : Path
        Arranged as a site's may be (`common.imaging.discovery`). A case whose name ends with "-" and the name of a
        site of the study came from that site.

    Attributes
    ----------
    cases : the cases' names, sorted.
    sites : of each case, the site it came from, or None.

    Raises
    ------
    DataError : the folder holds no cases, or some do not fit the study.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self._study = study
        self._files = _sound_cases(study, folder)
        self.cases: tuple[str, ...] = tuple(case.name for case in self._files)
        self.sites: tuple[str | None, ...] = tuple(site_of_origin(name, study.cohort.sites) for name in self.cases)
        self._cached: dict[int, HoldoutCase] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> HoldoutCase:
        """Case `index`, read the first time, and later too once 1 GB of cases is in memory. Not to be written to.

        Raises
        ------
        DataError : a file has vanished or was damaged since the holdout was checked.
        """
        with self._lock:
            if index in self._cached:
                return self._cached[index]
        loaded = self._read(self._files[index])
        with self._lock:
            if index not in self._cached and self._cached_bytes + loaded.nbytes <= _CACHE_BYTES:
                self._cached[index] = loaded
                self._cached_bytes += loaded.nbytes
        return loaded

    def _read(self, case: Case) -> HoldoutCase:
        task = self._study.task
        images, label = read_case(case, self._study)
        assert label is not None, "cases without a label were refused"
        if task.dimensions == 3:  # image and label may be stored turned otherwise
            label = to_ras(label)
        try:
            prepared = prepare_case(images, None, self._study)  # as in use, where there is no label
            classes = prepare_label(label, dimensions=3, classes=len(task.classes), labels=task.labels)
        except DataError as error:
            raise DataError(f"holdout case {case.name}: {error}") from error
        if classes.shape != (shape := prepared.grid.zoom.before):
            raise DataError(
                f"holdout case {case.name}: the label has the shape {classes.shape} (z, y, x), the image {shape}: its "
                "files have changed since they were checked. Start the coordinator again, which checks them anew."
            )
        instances = np.ascontiguousarray(label.array[..., 0], np.int32) if task.labels == "instances" else None
        return HoldoutCase(prepared.image, classes, prepared.grid, label.spacing, instances)

    def evaluate(
        self,
        predict: Predict,
        *,
        tile: Sequence[int],
        threads: int = 1,
        fixed_batch: bool = False,
        batch_size: int = 4,
        mirror: bool = True,
        sampler: Sampler | None = None,
    ) -> HoldoutResult:
        """Segment every image whole and measure its overlap on the grid as stored, where a study resamples too.

        Parameters
        ----------
        predict : callable
            Takes float32 of shape (b, *tile, channel), answers probabilities (b, *tile, outputs): of the classes for a
            softmax head, of the foreground classes for a sigmoid head. Called from `threads` threads at once.
        tile : sequence of int
            What `predict` takes; larger images are tiled with the study's overlap, smaller ones are padded.
        threads : int
            Cases in work at once; the result does not depend on it.
        fixed_batch : bool
            Every call gets exactly `batch_size` tiles.
        batch_size : int
        mirror : bool
            False leaves mirror images out where the study has them.
        sampler : Sampler
            Is shown the cases that it wants, on the grid as stored.

        Raises
        ------
        DataError : see `load`.
        """

        def measure(index: int) -> OverlapCounts:
            case = self.load(index)
            probabilities = self._segmented(predict, case, tile, fixed_batch, batch_size, mirror=mirror)
            predicted = self._predicted(case, probabilities)
            if sampler is not None and sampler.wants(index):
                sampler.take(index, lambda: _stored_image(case), case.label, predicted)
            return count_overlap(predicted, case.label, len(self._study.task.classes))

        counts = self._of_all(measure, threads)
        return HoldoutResult.of(self._study.task.foreground, self.cases, self.sites, counts)

    def evaluate_in_detail(
        self,
        predict: Predict,
        *,
        tile: Sequence[int],
        threads: int = 1,
        fixed_batch: bool = False,
        batch_size: int = 4,
    ) -> DetailedResult:
        """As `evaluate`, with all that docs/metrics.md defines; its `overlap` is what `evaluate` returns."""

        def measure(index: int) -> CaseDetail:
            case = self.load(index)
            return self._detail(case, self._segmented(predict, case, tile, fixed_batch, batch_size))

        details = self._of_all(measure, threads)
        return DetailedResult(
            self._study.task.foreground,
            self.cases,
            self.sites,
            tuple(details),
            self._study.evaluation.surface_tolerance,
        )

    def _segmented(
        self,
        predict: Predict,
        case: HoldoutCase,
        tile: Sequence[int],
        fixed_batch: bool,
        batch_size: int,
        *,
        mirror: bool = True,
    ) -> npt.NDArray[np.float32]:
        axes = range(self._study.task.dimensions) if mirror and self._study.evaluation.mirror else ()
        return predict_tiled(predict, case.image, tile, self._study.evaluation.overlap, batch_size, fixed_batch, axes)

    def _predicted(self, case: HoldoutCase, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        predicted = np.zeros(case.label.shape, np.uint8)
        for window, values in case.restored(probabilities):
            predicted[window] = class_indices(values, self._study.model.head)
        return predicted

    def _detail(self, case: HoldoutCase, probabilities: npt.NDArray[np.float32]) -> CaseDetail:
        task, head = self._study.task, self._study.model.head
        axes = slice(3 - task.dimensions, None)
        truth = _spatial(case.label, task.dimensions)
        # Where the crop does not reach there is no answer: background, of no confidence.
        classes, confidences = np.zeros(case.label.shape, np.uint8), np.zeros(case.label.shape, np.float32)
        maps: list[npt.NDArray[np.float32]] = []
        for window, values in case.restored(probabilities):
            classes[window] = class_indices(values, head)
            confidences[window] = predicted_confidence(values, head)
            if case.instances is not None:
                maps.append(values)
        predicted, confidence = _spatial(classes, task.dimensions), _spatial(confidences, task.dimensions)
        was_asked = confidence > 0
        instances = None
        if case.instances is not None:
            found = self._objects(case, maps)
            instances = match_instances(_spatial(found, task.dimensions), _spatial(case.instances, task.dimensions))
        return CaseDetail(
            overlap=count_overlap(predicted, truth, len(task.classes)),
            surfaces=measure_surfaces(
                predicted,
                truth,
                len(task.classes),
                spacing=list(case.spacing)[axes],
                tolerance=self._study.evaluation.surface_tolerance,
            ),
            calibration=count_calibration(confidence[was_asked], (predicted == truth)[was_asked]),
            instances=instances,
        )

    def _objects(self, case: HoldoutCase, maps: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.int32]:
        """The numbers of the objects that restored probabilities show, on the grid of `case.label`."""
        grid, dimensions = case.grid, self._study.task.dimensions
        found = np.zeros(case.label.shape, np.int32)
        if maps:
            where, _ = grid.zoom.back(grid.crop)
            spacing = spacing_of(grid.orientation.affine(grid.stored_affine, grid.stored_shape))
            joined = np.concatenate(maps, axis=3 - dimensions)
            _spatial(found[where], dimensions)[...] = instances_of(
                _spatial(joined, dimensions), self._study.model.head, spacing=spacing[3 - dimensions :]
            )
        return found

    def _of_all(self, measure: Callable[[int], _Measure], threads: int) -> list[_Measure]:
        """A value of every case, in order."""
        executor = ThreadPoolExecutor(threads, thread_name_prefix="holdout")
        try:
            return list(executor.map(measure, range(len(self))))
        finally:
            executor.shutdown(cancel_futures=True)  # after a failure, what has not begun is not begun


def _stored_image(case: HoldoutCase) -> npt.NDArray[np.float32]:
    """The prepared image on the grid of the case's label, (z, y, x, channel); its lowest value outside the crop."""
    image = np.full((*case.label.shape, case.image.shape[-1]), case.image.min(initial=0.0), np.float32)
    for window, values in case.restored(case.image):
        image[window] = values
    return image


def _spatial(array: npt.NDArray[_Voxel], dimensions: int) -> npt.NDArray[_Voxel]:
    """(z, y, x) without the z axis of a 2D image, which is measured in its plane."""
    return array if dimensions == 3 else array[0]


def _sound_cases(study: Study, folder: Path) -> list[Case]:
    """The folder's cases under the study's modalities; one that is not sound refuses the whole holdout."""
    found = discover(folder)
    requirements = Requirements.of(study)
    cases = [case.with_modalities(study.task.modalities) for case in found.cases]
    examined = (
        examine_case(case, requirements, registered=stored.images)[1]
        for case, stored in zip(cases, found.cases, strict=True)
    )
    findings = [*found.findings, *(finding for found_of_case in examined for finding in found_of_case)]
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        lines = "\n".join(f"  {finding.code} {finding.message}. {finding.advice}" for finding in errors)
        raise DataError(f"{folder}: the holdout cannot be used:\n{lines}")
    return cases


def site_of_origin(case: str, sites: Sequence[str]) -> str | None:
    """The longest of the sites' names that the case's name ends with after a "-", or None."""
    return max((site for site in sites if case.endswith(f"-{site}")), key=len, default=None)
