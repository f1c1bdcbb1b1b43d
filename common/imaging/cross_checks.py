"""What only shows when the cases of a site lie beside each other: copies, patients on both sides, outliers.

Works on facts alone; no file is opened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

import numpy as np

from common.imaging.facts import CaseFacts, ImageFacts
from common.imaging.findings import Code, Finding
from common.imaging.grid_checks import ras_spacing
from common.wording import counted, listed

# The modified z-score of Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993; they flag 3.5, for normally
# distributed values. Images of one device are less regular than that, and a warning that is always there is not read.
OUTLIER_Z = 6.0
_NORMAL = 0.6745
_FEWEST_FOR_OUTLIERS = 8
_SPACING_RATIO = 1.5

_Item = TypeVar("_Item")


def examine_cases(
    facts: Sequence[CaseFacts], validation: AbstractSet[str] = frozenset(), out: AbstractSet[str] = frozenset()
) -> list[Finding]:
    """Compare the cases of a site with each other.

    Parameters
    ----------
    facts : of all cases that could be read.
    validation : names of the cases that are validated on; the others are trained on.
    out : names of the cases that errors of their own keep out. They are compared with the others for copies, but give
        no warnings, and do not count for what is ordinary.

    Returns
    -------
    list of Finding
        Sorted by case. Of copies all but the first by name are errors; where copies have different labels, all of
        them are. Of a patient on both sides the cases of the validation are errors, unless copies keep the rest out.
    """
    cases = sorted(facts, key=lambda case: case.name)
    copies = _copies(cases)
    sound = [case for case in cases if case.name not in out | kept_out(copies)]
    findings = [
        *copies,
        *_shared_images(sound),
        *_shared_labels(sound),
        *patients_in_both([case for case in cases if case.name not in kept_out(copies)], validation),
        *_no_foreground(cases),
        *_intensity_outliers(sound),
        *_spacing_outliers(sound),
    ]
    return sorted(findings, key=lambda finding: (finding.case, finding.code, finding.file, finding.message))


def kept_out(findings: Iterable[Finding]) -> set[str]:
    """The names of the cases that an error keeps out."""
    return {finding.case for finding in findings if finding.level == "error" and finding.case}


def enough_cases(usable: int, total: int, minimum: int | None) -> list[Finding]:
    """An error about the site, where fewer cases are left than the study asks for.

    Parameters
    ----------
    usable, total : the cases that no error keeps out, and all.
    minimum : the study's `cohort.minimum_cases`; None asks for all cases of the site, and for one at least.
    """
    if usable >= (max(total, 1) if minimum is None else minimum):
        return []
    if minimum is None:
        all_cases = "the one case" if total == 1 else f"all {total} cases"
        message = f"the study asks for {all_cases} to be sound, found {usable}" if total else "there are no cases"
    else:
        message = f"the study asks for at least {counted(minimum, 'sound case')}, found {usable}"
    return [Code.TOO_FEW.finding(message)]


def _copies(cases: Sequence[CaseFacts]) -> list[Finding]:
    findings = []
    for same in _groups(cases, _all_images):
        labelled = [case for case in same if case.label is not None]
        if len({_label_pixels(case) for case in labelled}) > 1:
            for case in labelled:
                twins = _names(other for other in labelled if other is not case)
                message = f"case {case.name}: its image is that of {twins}, with another label"
                findings.append(Code.CONTRADICTION.finding(message, case=case.name, file=_file(case)))
        first, *others = [*labelled, *(case for case in same if case.label is None)]
        for case in others:
            if _label_pixels(case) in ("", _label_pixels(first)):
                message = f"case {case.name}: image and label are those of {first.name}, which stays"
                findings.append(Code.DUPLICATE.finding(message, case=case.name, file=_file(case)))
    return findings


def _shared_images(cases: Sequence[CaseFacts]) -> list[Finding]:
    """One modality of several in two cases; cases that share all of them are copies and reported as such."""
    images = [(case, image) for case in cases for image in case.images.values() if image.minimum < image.maximum]
    findings = []
    for same in _groups(images, lambda item: item[1].pixels):
        for case, image in same:
            others = [other for other, _ in same if _all_images(other) != _all_images(case)]
            if others:
                message = f"image {image.file}: is an image of {_names(others)} too"
                findings.append(Code.SHARED_IMAGE.finding(message, case=case.name, file=image.file))
    return findings


def _shared_labels(cases: Sequence[CaseFacts]) -> list[Finding]:
    # Empty labels of one shape are all the same.
    labels = [(case, case.label) for case in cases if case.label is not None and case.label.values > 1]
    findings = []
    for same in _groups(labels, lambda item: item[1].pixels):
        for case, label in same:
            others = [other for other, _ in same if _all_images(other) != _all_images(case)]
            if others:
                message = f"label {label.file}: is the label of {_names(others)} too, whose image is another"
                findings.append(Code.SAME_LABEL.finding(message, case=case.name, file=label.file))
    return findings


def patients_in_both(cases: Sequence[CaseFacts], validation: AbstractSet[str]) -> list[Finding]:
    """Errors about the cases that are validated on while others of their patient are trained on.

    Parameters
    ----------
    cases : those that are used; a case that is kept out is not trained on.
    validation : names of the cases that are validated on; the others are trained on.
    """
    findings = []
    for same in _groups(cases, lambda case: case.patient):
        training = [case for case in same if case.name not in validation]
        for case in same:
            if training and case.name in validation:
                message = f"case {case.name}: is of the same patient as {_names(training)}, which is trained on"
                findings.append(Code.PATIENT_IN_BOTH.finding(message, case=case.name))
    return findings


def _no_foreground(cases: Sequence[CaseFacts]) -> list[Finding]:
    """An error about the data set: what there is to say of each label, W220 says."""
    labels = [case.label for case in cases if case.label is not None]
    if not labels or any(label.foreground for label in labels):
        return []
    what = "the only label is" if len(labels) == 1 else f"all {len(labels)} labels are"
    return [Code.NO_FOREGROUND.finding(f"{what} empty")]


def _intensity_outliers(cases: Sequence[CaseFacts]) -> list[Finding]:
    findings = []
    for images in _by_modality(cases).values():
        if len(images) < _FEWEST_FOR_OUTLIERS:
            continue
        means = _modified_z([image.mean for _, image in images])
        deviations = _modified_z([image.std for _, image in images])
        for (case, image), mean, deviation in zip(images, means, deviations, strict=True):
            if max(abs(mean), abs(deviation)) > OUTLIER_Z:
                message = (
                    f"image {image.file}: mean {image.mean:.4g} and standard deviation {image.std:.4g} lie "
                    f"{abs(mean):.1f} and {abs(deviation):.1f} robust deviations from the site's medians"
                )
                findings.append(Code.INTENSITY_OUTLIER.finding(message, case=case.name, file=image.file))
    return findings


def _modified_z(values: Sequence[float]) -> list[float]:
    """0.6745 (x - median) / MAD; where more than half of the values are equal, MAD is at least 1 % of the median."""
    array = np.array(values, np.float64)
    median = np.median(array)
    spread = max(float(np.median(np.abs(array - median))), 0.01 * abs(float(median)), 1e-12)
    scores: list[float] = (_NORMAL * (array - median) / spread).tolist()
    return scores


def _spacing_outliers(cases: Sequence[CaseFacts]) -> list[Finding]:
    findings = []
    for images in _by_modality(cases).values():
        if len(images) < _FEWEST_FOR_OUTLIERS:
            continue
        spacings = np.array([ras_spacing(image) for _, image in images])
        median = np.median(spacings, axis=0)
        for (case, image), spacing in zip(images, spacings, strict=True):
            if np.abs(np.log(spacing / median)).max() > np.log(_SPACING_RATIO):
                message = (
                    f"image {image.file}: spacing {_spacing(spacing)}, where the site's median is {_spacing(median)}"
                )
                findings.append(Code.SPACING_OUTLIER.finding(message, case=case.name, file=image.file))
    return findings


def _by_modality(cases: Sequence[CaseFacts]) -> dict[str, list[tuple[CaseFacts, ImageFacts]]]:
    found: defaultdict[str, list[tuple[CaseFacts, ImageFacts]]] = defaultdict(list)
    for case in cases:
        for modality, image in case.images.items():
            found[modality].append((case, image))
    return dict(found)


def _groups(items: Sequence[_Item], key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """The groups of two and more with one key, in the order of their first items."""
    found: defaultdict[Hashable, list[_Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return [group for group in found.values() if len(group) > 1]


def _all_images(case: CaseFacts) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((modality, image.pixels) for modality, image in case.images.items()))


def _label_pixels(case: CaseFacts) -> str:
    return case.label.pixels if case.label is not None else ""


def _file(case: CaseFacts) -> str:
    return next((image.file for image in case.images.values()), "")


def _names(cases: Iterable[CaseFacts]) -> str:
    return listed(sorted({case.name for case in cases}), most=3)


def _spacing(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values) + " (z, y, x)"
