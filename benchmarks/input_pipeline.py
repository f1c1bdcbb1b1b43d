"""Does a site's input pipeline keep up with training, and what does the cache of prepared cases save?

Training: `plan.work` (what a site does in a round) on batches of the real pipeline (`client.datasets`: cases of files,
patches drawn, augmentation) against `plan.work` on as many batches that were made beforehand, in turns in one process;
for augmentation "none", the study's "default", and "full" (all there are). 2D: batches of 8 patches of 128x128x3 from
generated microscopy of 256x256; 3D: 2 patches of 40x56x40 from generated volumes of 120x140x120 voxels (.nii.gz). A
U-Net of 16 filters.

How to read it: images per second are medians over the repetitions; "slowdown" is the median over the repetitions of the
pipeline's seconds over those of the ready batches, minus 1: 0.05 is 5 %. The building of the pipeline is in them, as in
every round of a site; the more `--batches` a round has, the less it weighs. "pipeline CPU" and "work CPU" are the
milliseconds of all cores that a batch takes in the pipeline alone and in `work` on ready batches; "share" is their
ratio: what the pipeline must cost where training uses every core, however much runs ahead.

Start of a round: seconds from a site's start (its cases checked, files in the page cache) to the first batch, with no
cache, with an empty cache (which is filled) and with a warm one; "set-up" is the part of it that is no case's: building
the pipeline, tracing the augmentation; measured as the time to the first batch of a second round.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import median, report
from benchmarks._study import benchmark_study
from client.case_cache import CaseCache
from client.datasets import SiteDataset
from client.selection import SiteCases, select_folder
from common.learning.runtime import configure_tensorflow
from common.study import AUGMENTATIONS, Study

SITE = "north"
_DEFAULT = next(field.default for field in dataclasses.fields(Study) if field.name == "augmentation")
AUGMENTATION: dict[str, tuple[str, ...]] = {"none": (), "default": _DEFAULT, "full": AUGMENTATIONS}
_WORK = {
    "case": "case",
    "augmentation": "augmentation",
    "ready_images": "ready images/s",
    "pipeline_images": "pipeline images/s",
    "slowdown": "slowdown",
    "pipeline_cpu_ms": "pipeline CPU ms",
    "work_cpu_ms": "work CPU ms",
    "cpu_share": "share",
}
_START = {
    "case": "case",
    "augmentation": "augmentation",
    "without_seconds": "no cache s",
    "empty_seconds": "empty cache s",
    "warm_seconds": "warm cache s",
    "to_warm": "no cache / warm",
    "setup_seconds": "set-up s",
}


@dataclass(frozen=True)
class Case:
    """What is trained, and on how many cases."""

    name: str
    patch: tuple[int, ...]
    channels: int
    batch: int
    depth: int
    cases: int

    def __str__(self) -> str:
        return f"{self.name}, {self.batch} of {'x'.join(map(str, (*self.patch, self.channels)))}"


CASES = {"2d": Case("2D", (128, 128), 3, 8, 4, 32), "3d": Case("3D", (40, 56, 40), 1, 2, 3, 8)}


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES), help="(default: both)")
    parser.add_argument(
        "--batches",
        type=int,
        default=40,
        help="batches of one repetition (default: 40, a round of the shipped nuclei study)",
    )
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each (default: 7)")
    parser.add_argument("--starts", type=int, default=5, help="starts of a site of each kind (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads (default: 2)")
    options = parser.parse_args()
    if min(options.batches, options.repetitions, options.starts, options.threads) < 1:
        parser.error("expected positive numbers")
    configure_tensorflow(options.threads)
    work: list[dict[str, Any]] = []
    start: list[dict[str, Any]] = []
    for case in (CASES[name] for name in options.cases):
        study = _study(case, options.batches, options.threads)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (_microscopy if case.name == "2D" else _volumes)(folder / "data", case.cases)
            cases = select_folder(study, folder / "data" / SITE)
            work += measure_work(case, study, cases, folder, options.batches, options.repetitions)
            start += measure_start(case, study, cases, folder, options.starts)
    report("input_pipeline", work, _WORK)
    report("input_pipeline_start", start, _START)


def open_site(study: Study, cases: SiteCases, cache: CaseCache | None) -> SiteDataset:
    """The site's data set as its agent opens it."""
    return SiteDataset(study, SITE, cases, cache)


def measure_work(
    case: Case, study: Study, cases: SiteCases, folder: Path, batches: int, repetitions: int
) -> list[dict[str, Any]]:
    """A row for each augmentation: ready batches and pipelines in turns."""
    import tensorflow as tf

    from common.learning.plan import build_plan

    plan = build_plan(study).train  # augmentation is no part of it
    broadcast = plan.prepare(*plan.initialize())
    cache = CaseCache(folder / "cache", 2**40)
    sites = {
        name: open_site(dataclasses.replace(study, augmentation=names), cases, cache)
        for name, names in AUGMENTATION.items()
    }
    images, labels = (np.stack(parts) for parts in zip(*_drawn(sites["none"], batches), strict=True))
    ready = tf.data.Dataset.from_tensor_slices((images, labels)).prefetch(2)
    seconds: dict[str, list[float]] = {name: [] for name in ("ready", *sites)}
    cpu: dict[str, list[float]] = {name: [] for name in ("ready", *sites)}
    for turn in range(repetitions + 1):
        wall, spent = time.perf_counter(), time.process_time()
        plan.work(ready, broadcast)
        seconds["ready"].append(time.perf_counter() - wall)
        cpu["ready"].append(time.process_time() - spent)
        for name, site in sites.items():
            wall = time.perf_counter()
            plan.work(site.training(turn), broadcast)
            seconds[name].append(time.perf_counter() - wall)
            iterator = iter(site.training(turn))
            next(iterator)
            spent = time.process_time()
            drawn = sum(1 for _ in iterator)
            cpu[name].append((time.process_time() - spent) * batches / drawn)

    def images_per_second(name: str) -> float:
        return round(batches * case.batch / median(seconds[name][1:]), 3)

    return [
        {
            "case": str(case),
            "augmentation": name,
            "repetitions": repetitions,
            "ready_images": images_per_second("ready"),
            "pipeline_images": images_per_second(name),
            "slowdown": round(
                statistics.median(a / b for a, b in list(zip(seconds[name], seconds["ready"], strict=True))[1:]) - 1, 3
            ),
            "pipeline_cpu_ms": round(1000 * median(cpu[name][1:]) / batches, 3),
            "work_cpu_ms": round(1000 * median(cpu["ready"][1:]) / batches, 3),
            "cpu_share": round(median(cpu[name][1:]) / median(cpu["ready"][1:]), 3),
        }
        for name in sites
    ]


def measure_start(case: Case, study: Study, cases: SiteCases, folder: Path, starts: int) -> list[dict[str, Any]]:
    """A row for each augmentation: the time to the first batch without a cache, with an empty and with a warm one."""
    rows = []
    for name, names in AUGMENTATION.items():
        own = dataclasses.replace(study, augmentation=names)
        seconds: dict[str, list[float]] = {"without": [], "empty": [], "warm": [], "setup": []}
        for turn in range(starts):
            path = folder / f"{name}-{turn}"
            for kind in ("without", "empty", "warm"):
                started = time.perf_counter()
                # A new object each time, as a new process has it: digests are computed again.
                site = open_site(own, cases, None if kind == "without" else CaseCache(path, 2**40))
                _drawn(site, 1)
                seconds[kind].append(time.perf_counter() - started)
            started = time.perf_counter()
            _drawn(site, 1)
            seconds["setup"].append(time.perf_counter() - started)
        row = {f"{kind}_seconds": median(values) for kind, values in seconds.items()}
        to_warm = round(row["without_seconds"] / row["warm_seconds"], 3)
        rows.append({"case": str(case), "augmentation": name, "starts": starts, **row, "to_warm": to_warm})
    return rows


def _drawn(site: SiteDataset, batches: int) -> list[tuple[Any, Any]]:
    return list(itertools.islice(site.training(0).as_numpy_iterator(), batches))


def _study(case: Case, batches: int, threads: int) -> Study:
    study = benchmark_study(
        filters=16, depth=case.depth, patch=case.patch, channels=case.channels, batch_size=case.batch, threads=threads
    )
    training = dataclasses.replace(study.training, patches_per_epoch=batches * case.batch)
    if case.name == "2D":
        return dataclasses.replace(study, training=training, task=dataclasses.replace(study.task, labels="instances"))
    preprocessing = dataclasses.replace(
        study.preprocessing, spacing=(1.5, 1.5, 1.5), intensity="foreground_zscore", crop="foreground"
    )
    return dataclasses.replace(study, training=training, preprocessing=preprocessing)


def _microscopy(folder: Path, cases: int) -> None:
    from server.simulation.hospitals import generate_hospitals

    generate_hospitals(folder, seed=0, images_per_site={SITE: cases}, holdout_per_site=0, size=256)


def _volumes(folder: Path, cases: int) -> None:
    """NIfTI volumes of 120x140x120 voxels of 1 mm: an ellipsoid of smooth structure and noise on zero, as int16."""
    import nibabel as nib
    from scipy import ndimage

    for kind in ("images", "labels"):
        (folder / SITE / kind).mkdir(parents=True)
    shape = (120, 140, 120)
    axes: Sequence[Any] = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    radius = np.sqrt(sum(axis**2 for axis in axes))
    for index in range(cases):
        rng = np.random.default_rng(index)
        structure = ndimage.zoom(rng.standard_normal((15, 15, 15)), np.divide(shape, 15), order=1)
        values = 600 + 150 * structure + 20 * rng.standard_normal(shape)
        image = np.where(radius < 0.9, values.clip(1, 4000), 0).astype(np.int16)
        label = (radius < 0.3).astype(np.uint8)
        for kind, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / SITE / kind / f"{index:04d}.nii.gz")


if __name__ == "__main__":
    main()
