"""Is a case fit to be trained on? Every file is read once, and whatever is wrong with it becomes a finding with a code.

A site calls `examine_case` for every case, one after the other, then `examine_cases` on the facts of all, and
`enough_cases` on what is left. Nothing of it raises on bad input: a damaged file costs its own case, never the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.imaging.case import Case, Source
from common.imaging.cross_checks import enough_cases, examine_cases, kept_out
from common.imaging.facts import CaseFacts, ImageFacts, LabelFacts, image_facts, label_facts
from common.imaging.findings import BY_CODE, Code, Finding, Level
from common.imaging.grid_checks import grid_fault, is_placed, overlap, same_grid
from common.imaging.preprocessing import LEAST_COVERED, channels_fit
from common.imaging.source_checks import Refused, origin_of, read
from common.imaging.volume import Volume
from common.study import Study

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

_NAMED = 5
# An instance label holds a value for each object. This many parts of one value are no crumbs of an object any more.
_PARTS_OF_AN_OBJECT = 4
_FEW_VALUES = 3
_OTHER_GRID = (Code.SHAPE_MISMATCH, Code.SPACING_MISMATCH, Code.AFFINE_MISMATCH)


@dataclass(frozen=True)
class Requirements:
    """What a study asks of a case and of a site; the attributes are the keys of `task` and `cohort` in the study."""

    dimensions: int
    channels: int
    classes: tuple[str, ...]
    labels: str
    modalities: tuple[str, ...] = ()
    missing_modality: str = "error"
    minimum_cases: int | None = None

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
        )

    @property
    def channels_of_an_image(self) -> int:
        """Every modality is one channel; the one image of a study without modalities has all of them."""
        return 1 if self.modalities else self.channels


def examine_case(
    case: Case, requirements: Requirements | None = None, label_map: Mapping[int, int] | None = None
) -> tuple[CaseFacts | None, list[Finding]]:
    """Read a case and find what is wrong with it.

    Holds one image or label in memory at a time.

    Parameters
    ----------
    case : its images keyed by the study's modalities; modalities that the study does not name are not read.
    requirements : of the study; None examines what every study would ask.
    label_map : stored label value -> class index; a value that is not in it is no class, except 0, which is
        background. None: the values are the classes.

    Returns
    -------
    facts : None where a file could not be read.
    findings : in the order of the case's sources. Never raised: a case with an error among them is to be kept out.
    """
    findings, images = _examine_images(case, requirements)
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


def _examine_images(case: Case, requirements: Requirements | None) -> tuple[list[Finding], dict[str, ImageFacts]]:
    findings: list[Finding] = []
    images: dict[str, ImageFacts] = {}
    wanted = _order(case, requirements)
    absent = [modality for modality in wanted if modality not in case.images]
    if absent:
        findings.append(_missing(case, absent, requirements))
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
        findings += _image_faults(case.name, facts, requirements)
    return findings, images


def _missing(case: Case, absent: Sequence[str], requirements: Requirements | None) -> Finding:
    names = _list([modality or "the image" for modality in absent])
    nothing = requirements is None or len(absent) == len(requirements.modalities or ("",))
    tolerated = requirements is not None and requirements.missing_modality == "zero" and not nothing
    code = Code.ABSENT_MODALITY if tolerated else Code.MISSING_MODALITY
    there = _list(sorted(modality for modality in case.images if modality)) or "none by name"
    return code.finding(f"case {case.name}: expected {names}, found {there}", case=case.name)


def _image_faults(case: str, facts: ImageFacts, requirements: Requirements | None) -> list[Finding]:
    findings = []

    def add(code: Code, message: str) -> None:
        findings.append(code.finding(f"image {facts.file}: {message}", case=case, file=facts.file))

    if requirements and not channels_fit(facts.channels, requirements.channels_of_an_image):
        add(Code.CHANNELS, f"expected {requirements.channels_of_an_image} channels, found {facts.channels}")
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
    return facts, findings


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
    classes = len(requirements.classes) if requirements else 256
    if label_map is not None:
        beyond = sorted({index for index in label_map.values() if not 0 <= index < classes})
        if beyond:
            faults.append((Code.UNKNOWN_VALUE, f"the label map leads to {_list(beyond)}, of {classes} classes from 0"))
        unknown = [value for value in values if value not in label_map]
        expected = f"values of the label map ({_list(sorted(label_map))})"
    elif requirements is not None and requirements.labels == "classes":
        unknown = [value for value in values if value >= classes]
        expected = f"class indices 0 to {classes - 1}"
    else:
        unknown, expected = [], ""
    if unknown:
        faults.append((Code.UNKNOWN_VALUE, f"expected {expected}, found {_list(unknown)}"))
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


def _list(names: Sequence[str] | Sequence[int]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(str(name) for name in names[:_NAMED]) + more
