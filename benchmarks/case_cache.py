"""In which format should a site keep its prepared cases on disk?

Compared in the same run, in turns: the tensor blob of `common.wire.tensors` (mapped), .npy (one file each for image and
label, mapped), .npz (not compressed), zstd (imagecodecs, level 1, image and label in one file) and TFRecord (`tf.io`).
Cases: 2D, generated microscopy of 256x256x3, z-scored; 3D, volumes of 155x240x240x4 (z, y, x, channel), background
zero, values of integers, z-scored: float32 images and uint8 labels, as preprocessing makes them. Written is each case
with fsync and rename; read is the patch of a random case at a random place (128x128, 96x96x96), image and label,
copied, the file opened anew each time: "warm" from the system's page cache, "cold" right after the system was asked to
drop the file from it (`posix_fadvise`; it is still in the cache of the disk or the host).

"cache" is the entry as `client.case_cache` keeps it, through `CaseCache.get`: the blob with a digest, a lock, and the
listing of the folder on writing; "first" is its first use by a process, which computes the digest of the whole.

How to read it: medians in milliseconds a case; "x blob" is the time or size over the blob's of the same run, so more
than 1 is slower or larger.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import report
from client.case_cache import CaseCache
from common.imaging.preprocessing import Prepared, prepare_case
from common.imaging.volume import Volume, scaling_affine
from common.study import Study, parse_study
from common.wire.tensors import Array, read_tensors, write_tensors
from server.simulation.hospitals import render_case

_SHOWN = {
    "data": "data",
    "format": "format",
    "megabytes": "MB a case",
    "bytes_to_blob": "x blob",
    "write_ms": "write ms",
    "write_to_blob": "x blob",
    "first_ms": "first ms",
    "cold_ms": "cold ms",
    "cold_to_blob": "x blob",
    "warm_ms": "warm ms",
    "warm_to_blob": "x blob",
}

Pair = tuple[Array, Array]


class Format(ABC):
    """A way to keep image and label of case `index` in files of a folder."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    @abstractmethod
    def write(self, index: int, prepared: Prepared) -> None:
        """Durable, and there as a whole or not at all."""

    @abstractmethod
    def read(self, index: int) -> Pair:
        """Image and label, mapped where the format allows it."""

    def files(self, index: int) -> list[Path]:
        """The files of a case."""
        return [path for path in self.folder.iterdir() if path.name.startswith(f"{index:064x}.")]

    def path(self, index: int, suffix: str) -> Path:
        return self.folder / f"{index:064x}.{suffix}"


class Blob(Format):
    name = "blob"

    def write(self, index: int, prepared: Prepared) -> None:
        write_tensors(self.path(index, "wrt"), [prepared.image, _label(prepared)])

    def read(self, index: int) -> Pair:
        image, label = read_tensors(self.path(index, "wrt"))
        return image, label


class Cache(Format):
    name = "cache"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.restart()

    def restart(self) -> None:
        """As a new process would find it."""
        self._cache = CaseCache(self.folder, 2**40)

    def write(self, index: int, prepared: Prepared) -> None:
        self._cache.get(f"{index:064x}", lambda: prepared)

    def read(self, index: int) -> Pair:
        prepared = self._cache.get(f"{index:064x}", _missing)
        return prepared.image, _label(prepared)


class Npy(Format):
    name = "npy"

    def write(self, index: int, prepared: Prepared) -> None:
        for suffix, array in (("image.npy", prepared.image), ("label.npy", _label(prepared))):
            _replace(self.path(index, suffix), lambda file, array=array: np.save(file, array))

    def read(self, index: int) -> Pair:
        image, label = (np.load(self.path(index, f"{kind}.npy"), mmap_mode="r") for kind in ("image", "label"))
        return image, label


class Npz(Format):
    name = "npz"

    def write(self, index: int, prepared: Prepared) -> None:
        _replace(self.path(index, "npz"), lambda file: np.savez(file, image=prepared.image, label=_label(prepared)))

    def read(self, index: int) -> Pair:
        with np.load(self.path(index, "npz")) as arrays:
            return arrays["image"], arrays["label"]


class Zstd(Format):
    name = "zstd"

    def write(self, index: int, prepared: Prepared) -> None:
        from imagecodecs import zstd_encode

        image, label = prepared.image, _label(prepared)
        parts = [zstd_encode(np.ascontiguousarray(array).view(np.uint8), level=1) for array in (image, label)]
        head = np.array([len(parts[0]), image.ndim, *image.shape], np.int64).tobytes()
        _replace(self.path(index, "zst"), lambda file: file.writelines([head, *parts]))

    def read(self, index: int) -> Pair:
        from imagecodecs import zstd_decode

        data = memoryview(self.path(index, "zst").read_bytes())
        length, rank = np.frombuffer(data[:16], np.int64)
        shape = np.frombuffer(data[16 : 16 + 8 * rank], np.int64)
        start = 16 + 8 * rank
        image = np.frombuffer(zstd_decode(data[start : start + length]), np.float32).reshape(shape)
        label = np.frombuffer(zstd_decode(data[start + length :]), np.uint8).reshape(shape[:-1])
        return image, label


class TfRecord(Format):
    name = "tfrecord"

    def write(self, index: int, prepared: Prepared) -> None:
        import tensorflow as tf

        features = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.serialize_tensor(array).numpy()]))
            for name, array in (("image", prepared.image), ("label", _label(prepared)))
        }
        example = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
        path = self.path(index, "tfrecord")
        partial = path.with_suffix(".partial")
        with tf.io.TFRecordWriter(str(partial)) as writer:
            writer.write(example)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def read(self, index: int) -> Pair:
        image, label = self._read(str(self.path(index, "tfrecord")))
        return image.numpy(), label.numpy()

    @cached_property
    def _read(self) -> Callable[[str], tuple[Any, Any]]:
        """A graph, as in an input pipeline; the same calls one by one take ten times as long."""
        import tensorflow as tf

        wanted = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "label")}

        def read(path: Any) -> tuple[Any, Any]:
            found = tf.io.parse_single_example(tf.data.TFRecordDataset(path).get_single_element(), wanted)
            return tf.io.parse_tensor(found["image"], tf.float32), tf.io.parse_tensor(found["label"], tf.uint8)

        return tf.function(read, input_signature=[tf.TensorSpec([], tf.string)])  # type: ignore[no-any-return]


FORMATS: Sequence[type[Format]] = (Blob, Cache, Npy, Npz, Zstd, TfRecord)


@dataclass(frozen=True)
class Data:
    """Prepared cases, and what is read of them."""

    name: str
    cases: list[Prepared]
    patch: tuple[int, ...]
    reads: int


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("2d", "3d"), default=["2d", "3d"], help="(default: both)")
    parser.add_argument("--cases", type=int, default=256, help="2D cases (default: 256)")
    parser.add_argument("--volumes", type=int, default=3, help="3D cases (default: 3)")
    parser.add_argument("--reads", type=int, default=100, help="2D patches read; a tenth of it in 3D (default: 100)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    options = parser.parse_args()
    if min(options.cases, options.volumes, options.reads) < 1:
        parser.error("expected positive numbers")
    rows = []
    for name in options.data:
        data = nuclei(options.cases, options.reads) if name == "2d" else volumes(options.volumes, options.reads)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure(data, Path(folder))
    report("case_cache", rows, _SHOWN)


def measure(data: Data, folder: Path) -> list[dict[str, Any]]:
    """A row for each format."""
    formats = [make(folder / make.name) for make in FORMATS]
    seconds: dict[tuple[str, str], list[float]] = {}

    def timed(format_: Format, what: str, action: Callable[..., Any], *arguments: Any) -> None:
        started = time.perf_counter()
        action(*arguments)
        seconds.setdefault((format_.name, what), []).append(time.perf_counter() - started)

    for format_ in formats:  # loads libraries
        format_.write(len(data.cases), data.cases[0])
        format_.read(len(data.cases))
        for path in format_.files(len(data.cases)):
            path.unlink()
    for index, case in enumerate(data.cases):
        for format_ in formats:
            timed(format_, "write", format_.write, index, case)
    for format_ in formats:
        if isinstance(format_, Cache):
            format_.restart()
            for index in range(len(data.cases)):
                timed(format_, "first", format_.read, index)
    rng = np.random.default_rng(0)
    for what in ("cold", "warm"):
        for _ in range(data.reads):
            index = int(rng.integers(len(data.cases)))
            where = _window(_label(data.cases[index]).shape, data.patch, rng)
            for format_ in formats:
                if what == "cold":
                    _forget(format_.files(index))
                else:
                    _read_patch(format_, index, where)
                timed(format_, what, _read_patch, format_, index, where)
    return [_row(data, format_, seconds) for format_ in formats]


def _row(data: Data, format_: Format, seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    def milliseconds(name: str, what: str) -> float:
        return round(1000 * statistics.median(seconds[name, what]), 3)

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (format_.folder.parent / name).iterdir())

    row: dict[str, Any] = {"data": data.name, "cases": len(data.cases), "format": format_.name}
    row["megabytes"] = round(size(format_.name) / len(data.cases) / 1e6, 3)
    row["bytes_to_blob"] = round(size(format_.name) / size(Blob.name), 3)
    for what in ("write", "cold", "warm"):
        row[f"{what}_ms"] = milliseconds(format_.name, what)
        row[f"{what}_to_blob"] = round(milliseconds(format_.name, what) / milliseconds(Blob.name, what), 3)
    row["first_ms"] = milliseconds(format_.name, "first") if (format_.name, "first") in seconds else "-"
    return row


# What is read and how. ------------------------------------------------------------------------------------------


def _window(shape: Sequence[int], patch: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...]:
    starts = [int(rng.integers(size - length + 1)) for size, length in zip(shape, patch, strict=True)]
    return tuple(slice(start, start + length) for start, length in zip(starts, patch, strict=True))


def _read_patch(format_: Format, index: int, where: tuple[slice, ...]) -> None:
    image, label = format_.read(index)
    image[where].copy()
    label[where].copy()


def _label(prepared: Prepared) -> Array:
    assert prepared.label is not None
    return prepared.label


def _missing() -> Prepared:
    raise RuntimeError("the cache has lost an entry")


def _replace(path: Path, write: Callable[[Any], None]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _forget(files: Sequence[Path]) -> None:
    """Has the system drop the files from its page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# Cases. ---------------------------------------------------------------------------------------------------------


def nuclei(cases: int, reads: int) -> Data:
    """Generated microscopy of 256x256x3; each picture serves four times, mirrored, which no format notices."""
    study = _study("dimensions: 2, channels: 3, classes: [background, cell], labels: instances", "[128, 128]")
    prepared = []
    for index in range(-(-cases // 4)):
        image, label = render_case("east", "training", index, seed=0, size=256)
        for flip in (slice(None), slice(None, None, -1)):
            for mirror in (slice(None), slice(None, None, -1)):
                turned = np.ascontiguousarray(image[flip, mirror])
                prepared.append(_prepare([turned[np.newaxis]], label[np.newaxis, flip, mirror], study))
    return Data("2D 256x256x3", prepared[:cases], (128, 128), reads)


def volumes(cases: int, reads: int) -> Data:
    """Volumes of 155x240x240 with four modalities: an ellipsoid of smooth structure and noise on zero, as integers."""
    from scipy import ndimage

    study = _study(
        "dimensions: 3, channels: 4, classes: [background, tumour], modalities: [T1pre, T1post, T2, FLAIR]",
        "[96, 96, 96]",
        "foreground_zscore",
    )
    shape = (155, 240, 240)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    radius = np.sqrt(sum(axis**2 for axis in axes))
    prepared = []
    for index in range(cases):
        rng = np.random.default_rng(index)
        images = []
        for _ in study.task.modalities:
            structure = ndimage.zoom(
                rng.standard_normal((20, 30, 30), np.float32), np.divide(shape, (20, 30, 30)), order=1
            )
            values = 600 + 150 * structure + 20 * rng.standard_normal(shape, np.float32)
            images.append(np.where(radius < 0.85, values.clip(1, 4000), 0).astype(np.int16))
        prepared.append(_prepare(images, (radius < 0.2).astype(np.int32), study))
    return Data("3D 155x240x240x4", prepared, (96, 96, 96), max(reads // 10, 1))


def _prepare(images: Sequence[Array], label: Array, study: Study) -> Prepared:
    affine = scaling_affine((1.0, 1.0, 1.0))

    def volume(array: Array) -> Volume:
        return Volume(array if array.ndim == 4 else array[..., np.newaxis], (1.0, 1.0, 1.0), affine)

    return prepare_case([volume(image) for image in images], volume(label.astype(np.int32)), study)


def _study(task: str, patch: str, intensity: str = "zscore") -> Study:
    return parse_study(
        f"""
        study: benchmark
        task: {{{task}}}
        preprocessing: {{patch: {patch}, intensity: {intensity}}}
        training: {{rounds: 1}}
        cohort: {{sites: [site]}}
        """
    )


if __name__ == "__main__":
    main()
