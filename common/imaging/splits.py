"""Which cases train and which validate: whole patients, chosen by a hash, so that the choice needs no memory."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from common.imaging.case import Case
from common.study import Evaluation


def split_cases(
    cases: Sequence[Case], evaluation: Evaluation, seed: int, *, independent: bool = False
) -> tuple[list[Case], list[Case]]:
    """Divide a site's cases as the study says: by its folds, or else by its validation fraction.

    Parameters
    ----------
    independent : bool
        Each patient's side follows from that patient alone, as differential privacy of patients needs: one patient more
        or less moves no other. The shares are then met by chance.

    Returns
    -------
    training, validation : lists of Case, each sorted by name
        Without a patient in common. Where there is a patient at all, one trains, unless sides are independent.
    """
    if independent:
        parts, part = evaluation.folds, evaluation.fold
        first, last = (0.0, evaluation.validation_fraction) if parts is None else (part / parts, (part + 1) / parts)
        return _sides(cases, {case.patient for case in cases if first <= _place(seed, case.patient) < last})
    if evaluation.folds is None:
        return split_by_patient(cases, evaluation.validation_fraction, seed)
    return k_folds(cases, evaluation.folds, seed)[evaluation.fold]


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
    return _sides(cases, set(chosen))


def k_folds(cases: Sequence[Case], k: int, seed: int) -> list[tuple[list[Case], list[Case]]]:
    """Divide the cases into k folds of whole patients, of nearly equal numbers of cases.

    Patients with the most cases are dealt first, those with equally many in the order of their hashes, each to the
    fold that has the fewest cases. Of fewer than k patients each has a fold of its own, the first ones, and in the
    others all train; a single patient always trains, as in `split_by_patient`.

    Returns
    -------
    list of (training, validation), one for each fold
        Each case validates in exactly one, where there are two patients; all are sorted by name.
    """
    if k < 2:
        raise ValueError(f"k: expected 2 folds or more, found {k}")
    groups = _by_patient(cases, seed)
    folds: list[list[str]] = [[] for _ in range(k)]
    sizes = [0] * k
    if len(groups) > 1:
        for patient in sorted(groups, key=lambda patient: -len(groups[patient])):  # stable: hash order among equals
            smallest = sizes.index(min(sizes))
            folds[smallest].append(patient)
            sizes[smallest] += len(groups[patient])
    return [_sides(cases, set(fold)) for fold in folds]


def _sides(cases: Sequence[Case], validating: AbstractSet[str]) -> tuple[list[Case], list[Case]]:
    """Training and validation, of which the second has the cases of these patients."""
    ordered = sorted(cases, key=lambda case: case.name)
    return (
        [case for case in ordered if case.patient not in validating],
        [case for case in ordered if case.patient in validating],
    )


def _by_patient(cases: Sequence[Case], seed: int) -> dict[str, list[Case]]:
    """The cases of each patient, patients in the order of their hashes."""
    groups: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.patient].append(case)
    order = sorted(groups, key=lambda patient: (_hash(seed, patient), patient))
    return {patient: groups[patient] for patient in order}


def _place(seed: int, patient: str) -> float:
    """From 0 to below 1, evenly over patients."""
    return int.from_bytes(_hash(seed, patient)[:6]) / 2**48


def _hash(seed: int, patient: str) -> bytes:
    return hashlib.sha256(_bytes(f"{seed}:{patient}")).digest()


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
