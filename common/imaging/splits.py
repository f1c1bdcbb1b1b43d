"""Which cases train and which validate: whole patients, chosen by a hash, so that the choice needs no memory."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

from common.errors import DataError
from common.imaging.case import Case


def split_by_patient(cases: Sequence[Case], fraction: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Choose whole patients for validation by a hash of seed and patient.

    The choice depends neither on the order of the cases nor on the machine, and a case that is added later moves few
    others. Patients are taken in the order of their hashes as long as they fit into the wanted number of cases; one
    more follows where that comes nearer to it. With one case a patient the number is met exactly.

    Parameters
    ----------
    cases : sequence of Case
    fraction : float in [0, 1)
        The share of cases for validation, rounded to whole cases. Above 0, at least one of two or more patients
        validates; one always trains.
    seed : int

    Returns
    -------
    training, validation : lists of Case, each sorted by name
        Without a patient in common.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected a number from 0 to below 1, found {fraction}")
    groups = _by_patient(cases, seed)
    chosen: list[str] = []
    if fraction > 0 and len(groups) > 1:
        wanted = max(1, min(math.floor(len(cases) * fraction + 0.5), len(cases) - 1))
        chosen = _patients_for(wanted, {patient: len(group) for patient, group in groups.items()})
    validating = set(chosen)
    training = [case for case in cases if case.patient not in validating]
    validation = [case for case in cases if case.patient in validating]
    return sorted(training, key=_name), sorted(validation, key=_name)


def k_folds(cases: Sequence[Case], k: int, seed: int) -> list[tuple[list[Case], list[Case]]]:
    """Divide the cases into k folds of whole patients, of nearly equal numbers of cases.

    Patients with the most cases are dealt first, those with equally many in the order of their hashes, each to the
    fold that has the fewest cases.

    Returns
    -------
    list of (training, validation), one for each fold
        Each case validates in exactly one; all are sorted by name.

    Raises
    ------
    DataError
        There are fewer than k patients.
    """
    if k < 2:
        raise ValueError(f"k: expected 2 folds or more, found {k}")
    groups = _by_patient(cases, seed)
    if len(groups) < k:
        raise DataError(
            f"{k} folds: only {len(groups)} patients have cases, and a patient is never divided. Ask for fewer folds, "
            "or add patients."
        )
    folds: list[list[Case]] = [[] for _ in range(k)]
    for patient in sorted(groups, key=lambda patient: -len(groups[patient])):  # stable: hash order among equals
        min(folds, key=len).extend(groups[patient])
    return [
        (
            sorted((case for other in folds if other is not fold for case in other), key=_name),
            sorted(fold, key=_name),
        )
        for fold in folds
    ]


def _by_patient(cases: Sequence[Case], seed: int) -> dict[str, list[Case]]:
    """The cases of each patient, patients in the order of their hashes."""
    groups: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.patient].append(case)
    order = sorted(groups, key=lambda patient: (hashlib.sha256(_bytes(f"{seed}:{patient}")).digest(), patient))
    return {patient: groups[patient] for patient in order}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names of files that are no UTF-8


def _patients_for(wanted: int, sizes: dict[str, int]) -> list[str]:
    """One to all but one of the patients, with about `wanted` cases together."""
    chosen: list[str] = []
    missing = wanted
    for patient, size in sizes.items():
        if size <= missing:
            chosen.append(patient)
            missing -= size
    others = [patient for patient in sizes if patient not in chosen]
    nearest = min(others, key=lambda patient: abs(missing - sizes[patient]))
    if not chosen or (len(others) > 1 and abs(missing - sizes[nearest]) < missing):
        chosen.append(nearest)
    return chosen


def _name(case: Case) -> str:
    return case.name
