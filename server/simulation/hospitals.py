"""Five hospitals' synthetic microscopy: RGB images of touching cells with instance labels, each site its own optics.

The hospitals differ as real ones do: in stain, cell size and density, focus, noise and exposure. An image is rendered
physically: fluorescence adds light to a dark field, stains absorb light of a bright field (Beer-Lambert, per RGB
channel); then come uneven illumination, defocus, shot noise and read noise.

A case depends on (seed, site, kind, index, size) alone, so more cases never change those that were there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile
from scipy import ndimage

from common.disk import cannot_write
from common.errors import DataError, UsageError

SETTINGS_FILE = "hospitals.json"
HOLDOUT = "holdout"
_GENERATOR = 1  # raise it when the same settings come to mean other images
_MARGIN = 24  # cells may reach into the image from this many pixels around it

FloatImage = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How one hospital stains and photographs its cells. Lengths are in pixels; colours are RGB.

    With `light` "emission", `field` and `stain` are light intensities (0 to 1) that add up; with "absorption", `field`
    is the light of an empty slide (0 to 1) and `stain` and `tissue` are absorbances of cells and what surrounds them.
    """

    light: Literal["emission", "absorption"]
    field: tuple[float, float, float]
    stain: tuple[float, float, float]
    tissue: tuple[float, float, float]
    colour: bool  # whether the camera tells colours apart
    rim: float  # how much stronger a cell's border is than its middle (negative: weaker)
    texture: float  # relative variation of the stain within a cell
    stain_spread: float  # relative variation of the stain from cell to cell
    exposure_spread: float  # relative variation of brightness from image to image
    shading: float  # fall-off of the illumination towards the corners
    blur: float  # standard deviation of the defocus
    photons: float  # at intensity 1; fewer give more shot noise
    read_noise: float  # standard deviation, in intensity
    radius: float  # mean radius of a cell
    radius_spread: float  # relative
    elongation: float  # largest ratio of a cell's axes
    irregularity: float  # relative waviness of a cell's border
    coverage: tuple[float, float]  # share of the image that cells cover: from, to
    clustering: float  # probability that a cell grows at the side of another


HOSPITALS: Mapping[str, Acquisition] = {
    "north": Acquisition(  # fluorescence, blue (DAPI): many small nuclei
        light="emission",
        field=(0.015, 0.02, 0.05),
        stain=(0.10, 0.26, 0.78),
        tissue=(0.0, 0.01, 0.03),
        colour=True,
        rim=-0.45,
        texture=0.22,
        stain_spread=0.35,
        exposure_spread=0.20,
        shading=0.15,
        blur=0.8,
        photons=250.0,
        read_noise=0.008,
        radius=6.5,
        radius_spread=0.18,
        elongation=1.5,
        irregularity=0.05,
        coverage=(0.12, 0.30),
        clustering=0.5,
    ),
    "south": Acquisition(  # fluorescence, green, dim and noisy: few large cells
        light="emission",
        field=(0.02, 0.045, 0.02),
        stain=(0.07, 0.48, 0.12),
        tissue=(0.01, 0.05, 0.015),
        colour=True,
        rim=-0.3,
        texture=0.22,
        stain_spread=0.30,
        exposure_spread=0.30,
        shading=0.35,
        blur=1.6,
        photons=70.0,
        read_noise=0.02,
        radius=12.5,
        radius_spread=0.20,
        elongation=1.7,
        irregularity=0.09,
        coverage=(0.18, 0.36),
        clustering=0.6,
    ),
    "east": Acquisition(  # histology, haematoxylin and eosin: purple nuclei in pink tissue
        light="absorption",
        field=(0.95, 0.93, 0.95),
        stain=(0.85, 1.15, 0.42),
        tissue=(0.10, 0.52, 0.22),
        colour=True,
        rim=0.35,
        texture=0.28,
        stain_spread=0.22,
        exposure_spread=0.08,
        shading=0.08,
        blur=0.9,
        photons=900.0,
        read_noise=0.006,
        radius=8.0,
        radius_spread=0.25,
        elongation=2.0,
        irregularity=0.09,
        coverage=(0.20, 0.38),
        clustering=0.55,
    ),
    "west": Acquisition(  # cytology, purple on white: round cells, sharp, well exposed
        light="absorption",
        field=(0.97, 0.96, 0.98),
        stain=(0.80, 1.15, 0.32),
        tissue=(0.03, 0.08, 0.02),
        colour=True,
        rim=0.15,
        texture=0.20,
        stain_spread=0.20,
        exposure_spread=0.06,
        shading=0.05,
        blur=0.6,
        photons=2500.0,
        read_noise=0.004,
        radius=10.0,
        radius_spread=0.22,
        elongation=1.4,
        irregularity=0.06,
        coverage=(0.15, 0.32),
        clustering=0.65,
    ),
    "central": Acquisition(  # brightfield without colour: low contrast, dark rims, out of focus
        light="absorption",
        field=(0.66, 0.66, 0.65),
        stain=(0.34, 0.34, 0.35),
        tissue=(0.10, 0.10, 0.10),
        colour=False,
        rim=0.9,
        texture=0.30,
        stain_spread=0.22,
        exposure_spread=0.15,
        shading=0.25,
        blur=1.2,
        photons=400.0,
        read_noise=0.012,
        radius=9.0,
        radius_spread=0.20,
        elongation=1.6,
        irregularity=0.08,
        coverage=(0.18, 0.34),
        clustering=0.55,
    ),
}


def example_study() -> str:
    """The study file (YAML text) of the generated hospitals."""
    return resources.files(__package__).joinpath("example_study.yaml").read_text(encoding="utf-8")


def generate_hospitals(
    folder: Path,
    *,
    seed: int,
    images_per_site: Mapping[str, int] | int = 24,
    holdout_per_site: int = 4,
    size: int = 128,
) -> None:
    """Writes `<site>/{images,labels}/<case>.tif` and `holdout/{images,labels}/<case>-<site>.tif` under `folder`.

    Images are (y, x, RGB) uint8 and labels (y, x) uint16: 0 is background, cells are numbered 1 to n without gaps.
    Equal arguments give equal bytes. The folder appears complete or not at all; one that was made with the same
    arguments is kept, one made with others is replaced.

    Parameters
    ----------
    seed
        Any integer.
    images_per_site
        For every site, or by name (a site that is not named gets none and no folder).
    size
        Height and width in pixels, at least 32.

    Raises
    ------
    UsageError
        A site is unknown, or a number is out of range.
    DataError
        `folder` holds something that was not generated here; nothing in it is touched.
    RunFolderError
        The folder cannot be written.
    """
    counts = (
        dict(images_per_site) if isinstance(images_per_site, Mapping) else dict.fromkeys(HOSPITALS, images_per_site)
    )
    if unknown := sorted(counts.keys() - HOSPITALS.keys()):
        raise UsageError(f"images per site: expected sites out of {', '.join(HOSPITALS)}, found {', '.join(unknown)}")
    if not counts or min(counts.values()) < 1 or holdout_per_site < 0 or size < 32:
        raise UsageError(
            "generated images: expected at least 1 image a site, 0 for the holdout and 32 pixels a side, "
            f"found {counts}, {holdout_per_site} and {size}"
        )
    settings = _settings(seed, counts, holdout_per_site, size)
    cases = _cases(counts, holdout_per_site)
    if _is_complete(folder, settings, cases):
        return
    _refuse_foreign_files(folder)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for case in cases:
            image, labels = render_case(case.site, case.kind, case.index, seed=seed, size=size)
            for kind, pixels in (("images", image), ("labels", labels)):
                path = partial / case.path(kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                photometric = "rgb" if kind == "images" else "minisblack"
                tifffile.imwrite(path, pixels, photometric=photometric, metadata=None, software=False)
        (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        _replace(folder, partial, settings, cases)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def render_case(
    site: str, kind: Literal["training", "holdout"], index: int, *, seed: int, size: int = 128
) -> tuple[npt.NDArray[np.uint8], Labels]:
    """One case: an RGB image, shape (size, size, 3), and its instance labels, shape (size, size)."""
    digest = hashlib.sha256(f"{_GENERATOR}/{seed}/{site}/{kind}/{index}/{size}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    acquisition = HOSPITALS[site]
    labels = _grow_cells(acquisition, size + 2 * _MARGIN, rng)
    image = _photograph(acquisition, labels, rng)
    inner = (slice(_MARGIN, -_MARGIN), slice(_MARGIN, -_MARGIN))
    return image[inner], _numbered(labels[inner])


# Cells. ------------------------------------------------------------------------------------------------------------


def _grow_cells(acquisition: Acquisition, size: int, rng: np.random.Generator) -> Labels:
    """Places cells one by one until the coverage is reached: at the side of another cell, or anywhere.

    A new cell lies over older ones, but hides at most an eighth of any of them, and no crumb of it is left apart.
    """
    labels = np.zeros((size, size), np.uint16)
    areas: list[int] = [0]
    centres: list[tuple[float, float, float]] = []
    wanted = rng.uniform(*acquisition.coverage) * size * size
    covered = 0
    for _ in range(4 * int(wanted / (np.pi * acquisition.radius**2)) + 20):
        if covered >= wanted:
            break
        radius = acquisition.radius * max(0.5, 1 + acquisition.radius_spread * rng.standard_normal())
        if centres and rng.random() < acquisition.clustering:
            y, x, other = centres[rng.integers(len(centres))]
            angle, distance = rng.uniform(0, 2 * np.pi), (radius + other) * rng.uniform(0.85, 1.0)
            y, x = y + distance * np.sin(angle), x + distance * np.cos(angle)
        else:
            y, x = rng.uniform(0, size, 2)
        if not (0 <= y < size and 0 <= x < size):
            continue
        rows, columns, shape = _cell_shape(acquisition, y, x, radius, size, rng)
        window = labels[rows, columns]
        hidden = np.bincount(window[shape], minlength=len(areas))
        if not shape.any() or any(8 * hidden[k] > areas[k] for k in np.flatnonzero(hidden) if k):
            continue
        before = window.copy()
        window[shape] = len(areas)
        if any(ndimage.label(labels == k)[1] != 1 for k in np.flatnonzero(hidden) if k):
            window[...] = before
            continue
        covered += int(shape.sum()) - int(hidden[1:].sum())
        areas.append(int(shape.sum()))
        centres.append((y, x, radius))
    return labels


def _cell_shape(
    acquisition: Acquisition, y: float, x: float, radius: float, size: int, rng: np.random.Generator
) -> tuple[slice, slice, npt.NDArray[np.bool_]]:
    """An ellipse of `radius` (geometric mean of its axes) whose border waves; as a window of the image and a mask."""
    stretch = np.sqrt(rng.uniform(1, acquisition.elongation))
    turn = rng.uniform(0, np.pi)
    waves = np.arange(2, 7)
    heights = acquisition.irregularity * rng.standard_normal(waves.size) * 2 / waves
    phases = rng.uniform(0, 2 * np.pi, waves.size)
    reach = int(np.ceil(radius * stretch * 1.5)) + 1
    top, left = max(0, int(y) - reach), max(0, int(x) - reach)
    bottom, right = min(size, int(y) + reach + 1), min(size, int(x) + reach + 1)
    dy, dx = np.mgrid[top:bottom, left:right].astype(np.float64)
    dy, dx = dy - y, dx - x
    along = (dx * np.cos(turn) + dy * np.sin(turn)) / stretch
    across = (dy * np.cos(turn) - dx * np.sin(turn)) * stretch
    angle = np.arctan2(across, along)
    border = 1 + (heights[:, None, None] * np.cos(waves[:, None, None] * angle + phases[:, None, None])).sum(axis=0)
    mask = np.hypot(along, across) <= radius * np.clip(border, 0.6, 1.4)
    return slice(top, bottom), slice(left, right), mask


def _numbered(labels: Labels) -> Labels:
    """Cells of the window as 1 to n. What the image's edge leaves in pieces keeps the largest, and slivers go."""
    numbered = np.zeros_like(labels)
    count = 0
    for value in np.unique(labels[labels > 0]):
        pieces, pieces_found = ndimage.label(labels == value)
        sizes = np.bincount(pieces.ravel(), minlength=pieces_found + 1)[1:]
        if sizes.max() >= 8:
            count += 1
            numbered[pieces == sizes.argmax() + 1] = count
    return numbered


# Optics. -----------------------------------------------------------------------------------------------------------


def _photograph(acquisition: Acquisition, labels: Labels, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    size = len(labels)
    stain = _stain_of_cells(acquisition, labels, rng)[..., None] * np.array(acquisition.stain)
    surroundings = np.clip(1 + 0.35 * _smooth_noise(size, 9, rng) + 0.25 * _smooth_noise(size, 2.5, rng), 0, None)
    tissue = surroundings[..., None] * np.array(acquisition.tissue) * (labels == 0)[..., None]
    if acquisition.light == "emission":
        light = np.array(acquisition.field) + stain + tissue
    else:
        light = np.array(acquisition.field) * np.exp(-(stain + tissue))
    light = ndimage.gaussian_filter(light, (acquisition.blur, acquisition.blur, 0))
    light = light * _illumination(acquisition, size, rng)[..., None]
    electrons = rng.poisson(np.clip(light, 0, None) * acquisition.photons) / acquisition.photons
    intensity = electrons + acquisition.read_noise * rng.standard_normal(light.shape)
    if not acquisition.colour:
        intensity = np.repeat(intensity[..., :1], 3, axis=-1)
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(intensity * 255), 0, 255).astype(np.uint8)
    return pixels


def _stain_of_cells(acquisition: Acquisition, labels: Labels, rng: np.random.Generator) -> FloatImage:
    """Stain at every pixel, 0 outside of cells and about 1 within; overlapping cells part by their rims."""
    size = len(labels)
    strength = np.clip(1 + acquisition.stain_spread * rng.standard_normal(int(labels.max()) + 1), 0.35, 1.9)
    strength[0] = 0.0
    border = (ndimage.maximum_filter(labels, 3) != labels) | (ndimage.minimum_filter(labels, 3) != labels)
    depth = ndimage.distance_transform_edt((labels > 0) & ~border)  # pixels from the cell's border inwards
    rim = 1 + acquisition.rim * np.exp(-depth / (0.2 * acquisition.radius))
    texture = 1 + acquisition.texture * _smooth_noise(size, 0.14 * acquisition.radius, rng)
    stain: FloatImage = strength[labels] * rim * np.clip(texture, 0.2, None)
    return stain


def _illumination(acquisition: Acquisition, size: int, rng: np.random.Generator) -> FloatImage:
    """Brightness across the field: brightest near the middle, weaker towards the corners."""
    exposure = np.clip(1 + acquisition.exposure_spread * rng.standard_normal(), 0.5, 1.6)
    if acquisition.light == "absorption":
        exposure = min(exposure, 1.03)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    centre = rng.uniform(-0.3, 0.3, 2)
    fall_off = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 2
    field: FloatImage = exposure * (1 - acquisition.shading * np.clip(fall_off, 0, 1))
    return field


def _smooth_noise(size: int, scale: float, rng: np.random.Generator) -> FloatImage:
    """A random field of unit variance that varies over `scale` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), scale)
    unit: FloatImage = noise / noise.std()
    return unit


# Files. ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    site: str
    kind: Literal["training", "holdout"]
    index: int

    def path(self, pixels: str) -> Path:
        name = f"{self.index:04d}"
        if self.kind == "holdout":
            return Path(HOLDOUT, pixels, f"{name}-{self.site}.tif")
        return Path(self.site, pixels, f"{name}.tif")


def _cases(counts: Mapping[str, int], holdout_per_site: int) -> list[_Case]:
    training = [_Case(site, "training", index) for site in sorted(counts) for index in range(counts[site])]
    holdout = [_Case(site, "holdout", index) for site in sorted(counts) for index in range(holdout_per_site)]
    return training + holdout


def _settings(seed: int, counts: Mapping[str, int], holdout_per_site: int, size: int) -> dict[str, Any]:
    acquisitions = json.dumps({site: asdict(HOSPITALS[site]) for site in counts}, sort_keys=True)
    return {
        "generator": _GENERATOR,
        "seed": seed,
        "images_per_site": dict(counts),
        "holdout_per_site": holdout_per_site,
        "size": size,
        "acquisitions": hashlib.sha256(acquisitions.encode()).hexdigest(),
    }


def _is_complete(folder: Path, settings: Mapping[str, Any], cases: list[_Case]) -> bool:
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    paths = (folder / case.path(kind) for case in cases for kind in ("images", "labels"))
    return bool(found == settings) and all(path.is_file() for path in paths)


def _refuse_foreign_files(folder: Path) -> None:
    """Only what was generated here may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise DataError(
            f"generated images: expected a folder or nothing, found a file; choose another folder ({folder})"
        )
    entries = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(entries - {SETTINGS_FILE, HOLDOUT, *HOSPITALS})
    if foreign or (entries and SETTINGS_FILE not in entries):
        what = foreign[0] if foreign else "folders of sites that were not generated"
        raise DataError(
            f"generated images: expected an empty or generated folder, found {what}; choose another ({folder})"
        )


def _replace(folder: Path, partial: Path, settings: Mapping[str, Any], cases: list[_Case]) -> None:
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if not _is_complete(folder, settings, cases):  # otherwise another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
