"""Which cases a site trains on: those of its registered data sets, or of a folder, that are fit for the study."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.case_cache import case_key
from client.registry import Check, Registry
from client.registry_rows import files_mark
from common.imaging.case import Case
from common.imaging.facts import CaseFacts
from common.imaging.findings import Finding
from common.study import Study

_FOLDER = "folder"


@dataclass(frozen=True)
class SiteCases:
    """The cases of a site that no error keeps out of the study.

    Attributes
    ----------
    cases : sorted by name, with images by the study's modalities.
    facts : of every case, by its name.
    label_map : stored label value -> class index, or None where values are class indices.
    findings : everything that was found, of the cases that are kept out too.
    kept_out : how many cases errors keep out.
    marks : what the files of every case looked like when they were chosen, by its name.
    """

    cases: Sequence[Case]
    facts: Mapping[str, CaseFacts]
    label_map: Mapping[int, int] | None
    findings: Sequence[Finding]
    kept_out: int
    marks: Mapping[str, str]

    def key(self, case: Case, study: Study) -> str:
        """By which the prepared case is found in a cache: it follows from the files' content and the study."""
        level = max(source.level for source in case.sources)
        return case_key(self.facts[case.name].digests, study, label_map=self.label_map, level=level)


def select_cases(study: Study, data: Sequence[str], registry: Registry) -> SiteCases:
    """The cases of registered data sets.

    Raises
    ------
    UsageError : a data set is not registered.
    DataError : a folder cannot be listed, label maps contradict each other or the study, or fewer sound cases are left
        than the study asks for.
    """
    label_map, check = registry.cases_for(study, data)
    return _cases_of(check, label_map)


def select_folder(study: Study, folder: Path, registry: Path | None = None) -> SiteCases:
    """The cases of a folder that nobody registered.

    Parameters
    ----------
    registry : file that remembers what was found for the next time; None examines every case now.

    Raises
    ------
    DataError : as for `select_cases`; each file that keeps cases out is named.
    """
    if registry is None:
        with tempfile.TemporaryDirectory(prefix="wardround-") as temporary:
            return select_folder(study, folder, Path(temporary) / "registry.sqlite")
    with Registry(registry) as opened:
        known = {one.name: one.path for one in opened.data_sets()}
        if known.get(_FOLDER, folder.absolute()) != folder.absolute():
            opened.remove(_FOLDER)
        if known.get(_FOLDER) != folder.absolute():
            opened.add(_FOLDER, folder)
        return select_cases(study, [_FOLDER], opened)


def _cases_of(check: Check, label_map: Mapping[int, int] | None) -> SiteCases:
    usable = check.usable
    facts = {one.case.name: one.facts for one in check.examined if one.facts is not None}
    marks = {case.name: files_mark(case) for case in usable}
    return SiteCases(usable, facts, label_map, check.findings, len(check.names) - len(usable), marks)
