"""How much smaller and faster are the quantized files, and how far are their answers from float32's?

Every file is made by the publishing code and run by LiteRT on one thread, all of a network in turns in one process, so
that other load hits all alike; times are medians. In 3D the networks are published with their 3D convolutions written
as 2D ones; a row more is float32 with TensorFlow's own 3D convolutions, to tell what that alone gains.

How to read it: "smaller" and "faster" are float32's bytes and time divided by the file's, in 3D of the float32 that is
published; "against Conv3D" is the time of the float32 with 3D convolutions divided by the file's. "narrow" is the share
of the weights that is kept in 16 bits or fewer. "largest" and "mean" are differences of probabilities from float32's on
one tile. The weights are random, biases included, and so is the tile: answers of networks that were not trained differ
more than those of trained ones. `--published DIR ...` measures published versions instead; "Dice lost" is then that of
their manifests, or with `--holdout` of their files, evaluated here. Published files may have been made by an earlier
version: their sizes and times are what the files have.

The last row is MobileNetV3-Small, the network for video, at 256 x 256: "frames/s" is one by its time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._report import median, report
from benchmarks._study import benchmark_study
from common.errors import WardroundError
from common.inference.lite import LiteModel
from common.study import DEFAULT_VARIANTS, Study, load_study
from server.publishing.contents import contents_of

VIDEO_NETWORK = "mobilenetv3_small"
WITH_3D_OPERATIONS = "float32, Conv3D"
_SHOWN = {
    "network": "network",
    "variant": "variant",
    "bytes": "bytes",
    "smaller": "smaller",
    "milliseconds": "ms",
    "faster": "faster",
    "against_conv3d": "against Conv3D",
    "frames": "frames/s",
    "narrow": "narrow",
    "largest": "largest",
    "mean": "mean",
    "dice_lost": "Dice lost",
}

Tile = npt.NDArray[np.float32]
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Measured:
    """One network's files by variant, and the tile (1, *tile, channel) that they are run on."""

    title: str
    files: Mapping[str, Path]
    tile: Tile
    dice_lost: Mapping[str, float]


def main() -> None:
    """Measures the networks, or the published versions asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15, help="timed calls of each file (default: 15)")
    parser.add_argument("--published", type=Path, nargs="+", metavar="DIR", help="folders of published versions")
    parser.add_argument("--holdout", type=Path, help="evaluate the published versions on these images")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions: expected at least 1")
    if options.holdout and not options.published:
        parser.error("--holdout: give --published besides; networks that were not trained segment nothing")
    try:
        with tempfile.TemporaryDirectory(prefix="wardround-benchmark-") as folder:
            if options.published:
                networks = [_published(version, options.holdout) for version in options.published]
            else:
                networks = _untrained(Path(folder))
            rows = [row for network in networks for row in measure(network, options.repetitions)]
    except WardroundError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    report("export_published" if options.published else "export", rows, _SHOWN)


def measure(network: Measured, repetitions: int) -> list[Row]:
    """A row a file; the first call of each is not timed."""
    models = {name: LiteModel(path) for name, path in network.files.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    answers: dict[str, Tile] = {}
    for _ in range(repetitions + 1):
        for name, model in models.items():
            began = time.perf_counter()
            answers[name] = model(network.tile)
            seconds[name].append(time.perf_counter() - began)
    times = {name: median(values[1:]) for name, values in seconds.items()}
    sizes = {name: path.stat().st_size for name, path in network.files.items()}
    rows: list[Row] = []
    for name, path in network.files.items():
        difference = np.abs(answers[name] - answers["float32"])
        contents = contents_of(path.read_bytes())
        rows.append(
            {
                "network": network.title,
                "variant": name,
                "bytes": sizes[name],
                "smaller": round(sizes["float32"] / sizes[name], 3),
                "milliseconds": round(times[name] * 1e3, 1),
                "faster": round(times["float32"] / times[name], 3),
                "against_conv3d": (
                    round(times[WITH_3D_OPERATIONS] / times[name], 3) if WITH_3D_OPERATIONS in times else "-"
                ),
                "frames": round(1 / times[name], 1),
                "narrow": round(contents.narrow_share, 4),
                "largest": round(float(difference.max()), 5),
                "mean": round(float(difference.mean()), 6),
                "dice_lost": network.dice_lost.get(name, "-"),
                "float_operations": sum(contents.float_operations.values()),
                "operations": contents.operations,
            }
        )
    return rows


def _untrained(folder: Path) -> list[Measured]:
    flat = benchmark_study(filters=16, depth=4, patch=(256, 256), channels=3)
    deep = [benchmark_study(filters=filters, depth=3, patch=(40, 56, 40), channels=1) for filters in (8, 16)]
    video = replace(flat, model=replace(flat.model, name=VIDEO_NETWORK))
    networks = [_converted(study, folder) for study in (flat, *deep)]
    try:
        networks.append(_converted(video, folder))
    except KeyError:
        print(f"{VIDEO_NETWORK}: not among the networks of this version; left out")
    return networks


def _converted(study: Study, folder: Path) -> Measured:
    """Every variant of a network with random weights, written to `folder`."""
    from common.models import build_network
    from common.models.operations import NATIVE
    from server.publishing.conversion import convert

    network = build_network(study)
    random = np.random.default_rng(0)
    # Biases that are not 0, as trained ones: else the converter leaves them out.
    weights = [
        weight.numpy() + (0.1 * random.standard_normal(spec.shape).astype(np.float32) if len(spec.shape) == 1 else 0)
        for weight, spec in zip(network.initial_weights(0), network.specs, strict=True)
    ]
    tile = random.standard_normal((*study.publishing.tile, study.task.channels)).astype(np.float32)
    sizes = "x".join(map(str, study.publishing.tile))
    title = f"{study.model.name} {study.task.dimensions}D, {study.model.filters} filters, {sizes}"
    wanted = {name: (name, None) for name in DEFAULT_VARIANTS}
    if study.task.dimensions == 3:
        wanted = {WITH_3D_OPERATIONS: ("float32", NATIVE), **wanted}
    files = {}
    for name, (variant, operations) in wanted.items():
        files[name] = folder / f"{title}, {name}.tflite"
        files[name].write_bytes(convert(study, network, weights, variant, [tile], operations))
    return Measured(title, files, tile[np.newaxis], {})


def _published(version: Path, holdout: Path | None) -> Measured:
    """A published version's files for LiteRT, on a random tile."""
    manifest: dict[str, Any] = json.loads((version / "manifest.json").read_text(encoding="utf-8"))
    study = load_study(version / "study.yaml")
    entries: Sequence[Mapping[str, Any]] = [
        entry for entry in manifest["variants"] if str(entry["file"]).endswith(".tflite")
    ]
    files = {str(entry["name"]): version / str(entry["file"]) for entry in entries}
    lost = {entry["name"]: round(entry["dice_lost"], 5) for entry in entries if entry["dice_lost"] is not None}
    shape = (*study.publishing.tile, study.task.channels)
    tile = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if holdout is not None:
        from server.evaluation import Holdout

        images = Holdout(study, holdout)
        dice = {
            name: images.evaluate(
                LiteModel(path), tile=study.publishing.tile, threads=1, fixed_batch=True, batch_size=1
            ).mean_dice
            for name, path in files.items()
        }
        lost = {name: round(dice["float32"] - value, 5) for name, value in dice.items()}
    return Measured(f"{study.name} {version.name}", files, tile[np.newaxis], lost)


if __name__ == "__main__":
    main()
