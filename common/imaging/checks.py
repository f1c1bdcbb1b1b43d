"""Is a case fit to be trained on? Every file is read once, and whatever is wrong with it becomes a finding with a code.

A site calls `examine_case` for every case, one after the other, then `examine_cases` on the facts of all, and
`enough_cases` on what is left. Nothing of it raises on bad input: a damaged file costs its own case, never the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.imaging.case import Case, Source
from common.imaging.cross_checks import enough_cases, examine_cases, kept_out
from common.imaging.facts import CaseFacts, ImageFacts, LabelFacts, image_facts, label_facts
from common.imaging.findings import BY_CODE, Code, Finding, Level
from common.imaging.grid_checks import grid_fault, is_placed, overlap, resampling_fault, same_grid
from common.imaging.preprocessing import LEAST_COVERED, channels_fit
from common.imaging.source_checks import Refused, origin_of, read
from common.imaging.volume import Volume
from common.study import Study
from common.wording import counted, listed

__all__ = [
    "BY_CODE",
    "CaseFacts",
    "Code",
    "Finding",
    "ImageFacts",
    "LabelFacts",
    "Level",
    "Requirements",
    "enough_cases",
    "examine_case",
    "examine_cases",
    "kept_out",
]

# An instance label holds a value for each object. This many parts of one value are no crumbs of an object any more.
_PARTS_OF_AN_OBJECT = 4
_FEW_VALUES = 3
# What was measured has many values, hardly ever the same in two neighbours; objects are of one value throughout.
_MANY_VALUES = 100
_VALUES_OF_A_PART = 4
_FLAT = 0.5
_NAMED = 12
_OTHER_GRID = (Code.SHAPE_MISMATCH, Code.SPACING_MISMATCH, Code.AFFINE_MISMATCH)


@dataclass(frozen=True)
class Requirements:
    """What a study asks of a case and of a site; the attributes are keys of the study's sections."""

    dimensions: int
    channels: int
    classes: tuple[str, ...]
    labels: str
    modalities: tuple[str, ...] = ()
    missing_modality: str = "error"
    minimum_cases: int | None = None
    spacing: tuple[float, ...] | None = None

    @classmethod
    def of(cls, study: Study) -> Requirements:
        """The requirements of a study."""
        task = study.task
        return cls(
            dimensions=task.dimensions,
            channels=task.channels,
            classes=task.classes,
            labels=task.labels,
            modalities=task.modalities,
            missing_modality=task.missing_modality,
            minimum_cases=study.cohort.minimum_cases,
            spacing=study.preprocessing.spacing,
        )

    @property
    def channels_of_an_image(self) -> int:
        """Every modality is one channel; the one image of a study without modalities has all of them."""
        return 1 if self.modalities else self.channels


def examine_case(
    case: Case,
    requirements: Requirements | None = None,
    label_map: Mapping[int, int] | None = None,
    *,
    registered: Iterable[str] = (),
) -> tuple[CaseFacts | None, list[Finding]]:
    """Read a case and find what is wrong with it.

    Holds one image or label in memory at a time.

    Parameters
    ----------
    case : its images keyed by the study's modalities; modalities that the study does not name are not read.
    requirements : of the study; None examines what every study would ask.
    label_map : stored label value -> class index; a value that is not in it is no class, except 0, which is
        background. None: the values are the classes.
    registered : the modalities that the site has of the case, where `case` holds only those that the study names: what
        a finding about a missing one tells.

    Returns
    -------
    facts : None where a file could not be read.
    findings : in the order of the case's sources. Never raised: a case with an error among them is to be kept out.
    """
    findings, images = _examine_images(case, requirements, sorted(registered) or sorted(case.images))
    wanted = [modality for modality in _order(case, requirements) if modality in case.images]
    complete = len(images) == len(wanted)
    findings += _examine_modalities(case, images)
    label = None
    if case.label is None:
        findings.append(Code.MISSING_LABEL.finding(f"case {case.name}: has no label", case=case.name))
    else:
        label, found = _examine_label(case, case.label, images, requirements, label_map)
        findings += found
        complete = complete and label is not None
    facts = CaseFacts(name=case.name, patient=case.patient, images=images, label=label)
    return (facts if complete and images else None), findings


def _order(case: Case, requirements: Requirements | None) -> Sequence[str]:
    """The modalities to look for; the first that is there is the grid of the case."""
    return sorted(case.images) if requirements is None else requirements.modalities or ("",)


def _examine_images(
    case: Case, requirements: Requirements | None, registered: Sequence[str]
) -> tuple[list[Finding], dict[str, ImageFacts]]:
    findings: list[Finding] = []
    images: dict[str, ImageFacts] = {}
    wanted = _order(case, requirements)
    absent = [modality for modality in wanted if modality not in case.images]
    if absent and requirements is not None:
        findings.append(_missing(case.name, absent, requirements, registered))
    for modality in wanted:
        source = case.images.get(modality)
        if source is None:
            continue
        try:
            volume = read(source, requirements.dimensions if requirements else None)
            origin = origin_of(source)
            facts = image_facts(volume, source, origin.files, burned_in=origin.burned_in)
        except Refused as refused:
            findings.append(refused.finding(case.name, source.name))
            continue
        images[modality] = facts
        # The others are laid onto the first.
        findings += _image_faults(case.name, facts, requirements, is_first=len(images) == 1)
    return findings, images


def _missing(case: str, absent: Sequence[str], requirements: Requirements, registered: Sequence[str]) -> Finding:
    """What the study misses, beside what the case has: one of these may be it under another name."""
    wanted = requirements.modalities
    is_tolerated = requirements.missing_modality == "zero" and len(absent) < len(wanted)
    code = Code.ABSENT_MODALITY if is_tolerated else Code.MISSING_MODALITY
    if not wanted and len(registered) > 1:
        return code.finding(
            f"case {case}: the study takes one image without a name, the case has {len(registered)} modalities "
            f"({listed(registered, most=_NAMED)})",
            case=case,
            advice="Ask the coordinator whether the study should name its modalities, or say in a table cases.csv "
            "which image of each case is meant.",
        )
    known = {modality.casefold() for modality in wanted}
    unused = [modality for modality in registered if modality and modality.casefold() not in known]
    named = listed([modality for modality in registered if modality], most=_NAMED)
    there = named or ("one image without a name" if registered else "no image")
    message = (
        f"case {case}: expected {listed([name or 'an image' for name in absent], most=_NAMED)}; the case has {there}"
    )
    if not unused:
        return code.finding(message, case=case)
    otherwise = "add the image, if it was ever taken" if is_tolerated else "add the image, or remove the case"
    return code.finding(
        f"{message}, of which {listed(unused, most=_NAMED)} {'is' if len(unused) == 1 else 'are'} not used",
        case=case,
        advice=f"Register the data again with --channel-map '{absent[0]}=PATTERN' if it is one of these; otherwise "
        f"{otherwise}.",
    )


def _image_faults(case: str, facts: ImageFacts, requirements: Requirements | None, *, is_first: bool) -> list[Finding]:
    findings = []

    def add(code: Code, message: str) -> None:
        findings.append(code.finding(f"image {facts.file}: {message}", case=case, file=facts.file))

    wanted = requirements.channels_of_an_image if requirements else facts.channels
    if not channels_fit(facts.channels, wanted, facts.dtype):
        what = " that are no colours" if channels_fit(facts.channels, wanted) else ""
        add(Code.CHANNELS, f"expected {counted(wanted, 'channel')}, found {facts.channels} of {facts.dtype}{what}")
    if is_first and requirements and requirements.spacing:
        fault = resampling_fault(facts, requirements.spacing)
        if fault is not None:
            add(Code.TOO_FINE, fault)
    if facts.minimum == facts.maximum:
        add(Code.CONSTANT_IMAGE, f"every value is {facts.minimum:g}")
    if facts.burned_in:
        add(Code.BURNED_IN, "its header says that annotation is burnt into the pixels")
    return findings


def _examine_modalities(case: Case, images: Mapping[str, ImageFacts]) -> list[Finding]:
    """The images of one case beside each other: the first is what the others are compared with."""
    findings = []
    names = list(images)
    for index, modality in enumerate(names):
        facts = images[modality]
        twin = next((other for other in names[:index] if images[other].pixels == facts.pixels), None)
        if twin is not None:
            message = f"image {facts.file}: {twin} and {modality} are the same image"
            findings.append(Code.SAME_MODALITY.finding(message, case=case.name, file=facts.file))
        first = images[names[0]]
        if index == 0 or same_grid(first, facts):
            continue
        if not (is_placed(first) and is_placed(facts)):
            code, message = Code.NO_OVERLAP, f"is not on the grid of {names[0]}, and neither file says where it lies"
        else:
            share = overlap(first, facts)
            code = Code.OTHER_GRID if share >= LEAST_COVERED else Code.NO_OVERLAP
            message = f"is not on the grid of {names[0]}, and covers {share:.0%} of it"
        findings.append(code.finding(f"image {facts.file}: {message}", case=case.name, file=facts.file))
    return findings


def _examine_label(
    case: Case,
    source: Source,
    images: Mapping[str, ImageFacts],
    requirements: Requirements | None,
    label_map: Mapping[int, int] | None,
) -> tuple[LabelFacts | None, list[Finding]]:
    # A study takes the label on the grid of its first modality. Without a study any may come to be the first.
    beside = list(images.values())[: 1 if requirements else None]
    try:
        volume = _read_label(source, [image.volume for image in beside], requirements)
        facts, counts = label_facts(volume, source, origin_of(source).files, label_map)
    except Refused as refused:
        return None, [refused.finding(case.name, source.name)]
    findings = []

    def add(code: Code, message: str) -> None:
        findings.append(code.finding(f"label {facts.file}: {message}", case=case.name, file=facts.file))

    faults = [grid_fault(image, facts) for image in beside]
    if faults and faults[0] is not None and None not in faults:
        add(*faults[0])
    for code, message in _value_faults(facts, counts, requirements, label_map):
        add(code, message)
    if facts.values > _MANY_VALUES and facts.values > _VALUES_OF_A_PART * facts.components:
        share = _equal_neighbours(volume.array[..., 0])
        if share < _FLAT:
            found = f"{facts.values} values for {counted(facts.components, 'separate part')}"
            add(Code.LOOKS_LIKE_AN_IMAGE, f"{found}, and {share:.0%} of neighbours have the same")
    return facts, findings


def _equal_neighbours(label: npt.NDArray[np.integer[Any]]) -> float:
    """Of the voxels that lie side by side and are no background, the share with one value."""
    both = same = 0
    for axis in range(label.ndim):
        first, second = (label.take(range(at, label.shape[axis] - 1 + at), axis) for at in (0, 1))
        inside = (first != 0) & (second != 0)
        both += int(np.count_nonzero(inside))
        same += int(np.count_nonzero(inside & (first == second)))
    return same / both if both else 1.0


def _read_label(source: Source, grids: Sequence[Volume], requirements: Requirements | None) -> Volume:
    """On the first of the grids that it lies on. Raises Refused for the first where it lies on none."""
    first: Refused | None = None
    candidates: Sequence[Volume | None] = grids or [None]
    for grid in candidates:
        dimensions = requirements.dimensions if requirements else _dimensions_of(grid)
        try:
            return read(source, dimensions, is_label=True, grid=grid)
        except Refused as refused:
            first = first or refused
            if refused.code not in _OTHER_GRID:
                break
    assert first is not None
    raise first


def _dimensions_of(grid: Volume | None) -> int | None:
    if grid is None:
        return None
    return 2 if grid.shape[0] == 1 else 3


def _value_faults(
    facts: LabelFacts,
    counts: Mapping[int, int],
    requirements: Requirements | None,
    label_map: Mapping[int, int] | None,
) -> list[tuple[Code, str]]:
    faults: list[tuple[Code, str]] = []
    values = [value for value in counts if value != 0]
    classes = len(requirements.classes) if requirements else 255
    if label_map is not None:
        beyond = sorted({index for index in label_map.values() if not 0 <= index < classes})
        if beyond:
            faults.append((Code.UNKNOWN_VALUE, f"the label map leads to {listed(beyond)}, of {classes} classes from 0"))
        unknown = [value for value in values if value not in label_map]
        expected = f"values of the label map ({listed(sorted(label_map))})"
    elif requirements is not None and requirements.labels == "classes":
        unknown = [value for value in values if value >= classes]
        expected = f"class indices 0 to {classes - 1}"
    else:
        unknown, expected = [], ""
    if unknown:
        faults.append((Code.UNKNOWN_VALUE, f"expected {expected}, found {listed(unknown)}"))
    if facts.foreground == 0:
        faults.append((Code.EMPTY_LABEL, "holds background alone"))
    elif len(counts) == 1:
        faults.append((Code.FULL_LABEL, f"every value is {values[0]}"))
    if requirements is None or not values:
        return faults
    found = f"{len(values)} values for {facts.components} separate parts"
    if requirements.labels == "instances":
        if len(values) <= _FEW_VALUES and facts.components >= _PARTS_OF_AN_OBJECT * len(values):
            faults.append((Code.LOOKS_LIKE_CLASSES, found))
    # Objects are numbered without gaps, or nearly; a class scheme has no reason to have a value for every part.
    elif unknown and len(values) > 2 * classes and facts.components >= len(values) / 2:
        faults.append((Code.LOOKS_LIKE_INSTANCES, found))
    return faults
