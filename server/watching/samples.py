"""Sample predictions of the holdout by round, for page, TensorBoard and report: small pictures, bounded in number.

Layout of a run folder:

    samples/round-0007/index.json          {"format": 1, "round": 7, "classes": [...], "samples": [...]}
    samples/round-0007/0-1-image.png       case 0 of the index, slice 1 of it: the image
    samples/round-0007/0-1-truth.png       the label: a colour a class, background black
    samples/round-0007/0-1-prediction.png  what the round's weights predict, in the same colours
    samples/round-0007/0-1-difference.png  white: both agree on a class; orange: predicted only, or another class;
                                           blue: missed; black: background in both

A sample in the index has "case" (its name in the holdout), "site" (of origin, or null), "dice" (null where nothing is
to measure) and "slices": each has "z" (null for a plane) and the names of its four files. Volumes show up to three
slices: that with most label, and those where a quarter and three quarters of it lie. Pictures have at most 256 pixels
a side, all four of a slice the same size. A folder appears whole or not at all.

Few cases are kept: the first of each site of origin, then others, up to `MOST_CASES`, the same in every round. Of many
rounds the first, the newest, and evenly spaced ones between are kept, `MOST_ROUNDS` in all. Where the disk has no space
for them a round has no samples; nothing of this ends a round.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FORMAT: Final = 1
FOLDER: Final = "samples"
INDEX: Final = "index.json"
KINDS: Final = ("image", "truth", "prediction", "difference")
MOST_CASES: Final = 4
MOST_ROUNDS: Final = 24
MOST_BYTES: Final = 4_000_000
"""Of a round's pictures; further ones are left out."""
_MOST_PIXELS: Final = 256
_LOW, _HIGH = 0.5, 99.5
# Told apart by people who do not tell red from green: Okabe and Ito, "Color Universal Design", 2008.
PALETTE: Final = np.array(
    [(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0)], np.uint8
)
"""Colours of the classes by index; further classes begin again after the background."""
_BOTH, _ONLY_PREDICTED, _MISSED = (255, 255, 255), (230, 159, 0), (0, 114, 178)

_log = logging.getLogger("wardround.coordinator")
Classes = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.uint8]
Image = npt.NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """A slice of a case, small enough to be shown: image (y, x, channel), class indices (y, x) on the same grid."""

    z: int | None
    image: Image = field(repr=False)
    truth: Classes = field(repr=False)
    prediction: Classes = field(repr=False)


@dataclass(frozen=True)
class Taken:
    """One case as it was predicted."""

    case: str
    site: str | None
    dice: float | None
    views: tuple[View, ...]


@dataclass(frozen=True)
class Slice:
    """The four pictures of a slice; `z` is None for a plane."""

    z: int | None
    image: Path
    truth: Path
    prediction: Path
    difference: Path


@dataclass(frozen=True)
class Sample:
    """A case of a round's samples."""

    case: str
    site: str | None
    dice: float | None
    slices: tuple[Slice, ...]


def read_samples(run: Path, round_number: int) -> tuple[Sample, ...]:
    """A round's samples; () where it has none, or none that can be read."""
    folder = _folder(run, round_number)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return tuple(
            Sample(
                str(each["case"]),
                each["site"],
                each["dice"],
                tuple(Slice(one["z"], *(folder / Path(one[kind]).name for kind in KINDS)) for one in each["slices"]),
            )
            for each in index["samples"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def sampled_rounds(run: Path) -> list[int]:
    """The rounds that have samples, in order."""
    names = [path.name.removeprefix("round-") for path in (run / FOLDER).glob("round-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def choose_cases(sites: Sequence[str | None], most: int = MOST_CASES) -> list[int]:
    """Which cases of a holdout are shown, by index: the first of each site, then others in order.

    >>> choose_cases(["east", "east", "east", "north", None, "north"])
    [0, 1, 3, 4]
    """
    firsts = sorted({site: index for index, site in reversed(list(enumerate(sites)))}.values())
    others = [index for index in range(len(sites)) if index not in firsts]
    return sorted([*firsts, *others][:most])


def write_samples(run: Path, round_number: int, classes: Sequence[str], taken: Sequence[Taken]) -> None:
    """Writes a round's samples and removes those of rounds that are too many.

    A disk that does not take them is logged, and the round has none.
    """
    folder = _folder(run, round_number)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        index = _write(partial, taken) | {"format": FORMAT, "round": round_number, "classes": list(classes)}
        (partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        _thin(run, round_number)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)
        _log.warning("%s: the sample pictures of round %d cannot be written (%s)", folder, round_number, error.strerror)


def kept_rounds(numbers: Sequence[int], most: int = MOST_ROUNDS) -> set[int]:
    """Which of these rounds keep their samples: the first, the newest, and multiples of a power of two between.

    >>> sorted(kept_rounds(range(1, 12), most=6))
    [1, 4, 8, 11]
    """
    step, ends = 1, {min(numbers), max(numbers)} if numbers else set[int]()
    while len(kept := ends | {number for number in numbers if number % step == 0}) > most:
        step *= 2
    return kept


def _thin(run: Path, newest: int) -> None:
    numbers = [number for number in sampled_rounds(run) if number <= newest]  # later ones are of a run that went back
    keep = kept_rounds(numbers)
    for left in (run / FOLDER).glob(".round-*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    for number in sampled_rounds(run):
        if number not in keep:
            shutil.rmtree(_folder(run, number), ignore_errors=True)


def _folder(run: Path, round_number: int) -> Path:
    return run / FOLDER / f"round-{round_number:04d}"


def _write(folder: Path, taken: Sequence[Taken]) -> dict[str, Any]:
    samples, size = [], 0
    for number, case in enumerate(taken):
        slices = []
        for place, view in enumerate(case.views):
            encoded = {kind: png(pixels) for kind, pixels in pictures(view).items()}
            size += sum(map(len, encoded.values()))
            if size > MOST_BYTES:
                break
            files = {kind: f"{number}-{place}-{kind}.png" for kind in KINDS}
            for kind, content in encoded.items():
                (folder / files[kind]).write_bytes(content)
            slices.append({"z": view.z, **files})
        if slices:
            samples.append({"case": case.case, "site": case.site, "dice": case.dice, "slices": slices})
    return {"samples": samples}


def pictures(view: View) -> dict[str, Pixels]:
    """The four pictures of a slice, by kind, as RGB."""
    made = (_grey_or_colour(view.image), colours(view.truth), colours(view.prediction))
    return dict(zip(KINDS, (*made, difference(view.truth, view.prediction)), strict=True))


def _shown_slices(truth: Classes, planar: bool) -> list[int]:
    """Which slices along z are shown."""
    if planar or len(truth) == 1:
        return [0]
    label = np.count_nonzero(truth, axis=(1, 2))
    if not label.any():
        return [len(truth) // 2]
    within = np.cumsum(label) / label.sum()
    return sorted({int(np.searchsorted(within, 0.25)), int(label.argmax()), int(np.searchsorted(within, 0.75))})


def colours(classes: Classes) -> Pixels:
    """Class indices, (y, x), as RGB."""
    colour = np.where(classes > len(PALETTE) - 1, (classes - 1) % (len(PALETTE) - 1) + 1, classes)
    return np.asarray(PALETTE[colour], np.uint8)


def difference(truth: Classes, prediction: Classes) -> Pixels:
    """Where prediction and truth, (y, x), agree and differ, as RGB; see the module."""
    picture = np.zeros((*truth.shape, 3), np.uint8)
    picture[(truth == prediction) & (truth > 0)] = _BOTH
    picture[(truth != prediction) & (prediction > 0)] = _ONLY_PREDICTED
    picture[(truth > 0) & (prediction == 0)] = _MISSED
    return picture


def _grey_or_colour(image: npt.NDArray[np.float32]) -> Pixels:
    """An image, (y, x, channel), as RGB: three channels as colours, else the first as grey."""
    shown = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    low, high = np.percentile(shown, (_LOW, _HIGH)) if shown.size else (0.0, 1.0)
    scaled = (shown - low) / max(float(high - low), 1e-6)
    return np.asarray(np.clip(scaled * 255, 0, 255), np.uint8)


def png(pixels: Pixels) -> bytes:
    """RGB pixels, (y, x, 3), as a PNG."""
    from PIL import Image as Picture

    file = io.BytesIO()
    Picture.fromarray(pixels, "RGB").save(file, "PNG", optimize=False)
    return file.getvalue()


class Sampler:
    """Takes the chosen cases of a holdout as they are predicted: copies of few, small slices, and nothing more.

    Parameters
    ----------
    names, sites : of every case of the holdout, in order; a site is None where it is not known.
    planar : whether cases are planes, whose z axis is of length 1 and none of theirs.
    """

    def __init__(self, names: Sequence[str], sites: Sequence[str | None], *, planar: bool) -> None:
        self._names, self._sites, self._planar = names, sites, planar
        self._chosen = frozenset(choose_cases(sites))
        self._known: dict[int, list[tuple[int, Image, Classes]]] = {}  # slice, image, truth: the same in every round
        self._predictions: dict[int, list[Classes]] = {}

    def wants(self, index: int) -> bool:
        """Whether this case is shown."""
        return index in self._chosen

    def take(self, index: int, image: Callable[[], Image], truth: Classes, prediction: Classes) -> None:
        """A case was predicted: class indices (z, y, x); `image()` is (z, y, x, channel) on their grid, asked for once.

        May be called from several threads, for different cases.
        """
        step = -(-max(truth.shape[1:]) // _MOST_PIXELS)  # every so many voxels: classes are never blended
        if index not in self._known:
            whole = image()
            self._known[index] = [
                (z, whole[z, ::step, ::step].copy(), truth[z, ::step, ::step].copy())
                for z in _shown_slices(truth, self._planar)
            ]
        self._predictions[index] = [prediction[z, ::step, ::step].copy() for z, _, _ in self._known[index]]

    def taken(self, dice: Sequence[float]) -> list[Taken]:
        """What was taken in the newest evaluation; `dice` is that of every case of the holdout, NaN for none."""
        return [
            Taken(
                self._names[index],
                self._sites[index],
                None if math.isnan(dice[index]) else round(float(dice[index]), 4),
                tuple(
                    View(None if self._planar else z, image, truth, prediction)
                    for (z, image, truth), prediction in zip(self._known[index], self._predictions[index], strict=True)
                ),
            )
            for index in sorted(self._predictions)
        ]
