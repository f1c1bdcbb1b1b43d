"""A site's registered data: which folders it offers to studies, and what is known of every case in them.

A case is examined once and again only when its files change: their sizes and times are compared first, then their
digests. What was found stays in one small file (`registry_file`); images stay where they are.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from client import registry_rows as rows
from client.label_map import LabelMap
from client.registry_file import RegistryFile
from common.errors import DataError, UsageError, WardroundError
from common.imaging.case import Case
from common.imaging.checks import Requirements, enough_cases, examine_case, examine_cases, kept_out
from common.imaging.cross_checks import patients_in_both
from common.imaging.discovery import Arrangement, TakenFor, discover
from common.imaging.facts import CaseFacts
from common.imaging.findings import Code, Finding
from common.imaging.layouts.options import Layout
from common.imaging.splits import split_cases
from common.study import Study

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_CAUSES = 8
OnCase = Callable[[int, int], None]


@dataclass(frozen=True)
class DataSet:
    """A folder that the site has registered.

    Attributes
    ----------
    name : by which studies are given it.
    path : absolute.
    layout : what the user said about the folder.
    label_map : None where the labels' values are the classes.
    arrangement : how the folder was understood.
    added_at : seconds since the epoch.
    taken_for, without_patient : as in `Discovery`, as the folder was listed by `add` or `refresh`; not kept in the
        file.
    """

    name: str
    path: Path
    layout: Layout
    label_map: LabelMap | None
    arrangement: Arrangement
    added_at: float
    taken_for: TakenFor = field(default_factory=dict, compare=False)
    without_patient: Sequence[str] = field(default=(), compare=False)


@dataclass(frozen=True)
class Examined:
    """A case and what its examination gave; `facts` is None where a file could not be read."""

    case: Case
    facts: CaseFacts | None
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Check:
    """The state of a data set, or of several together.

    Attributes
    ----------
    examined : every case, sorted by name.
    findings : of folders, cases, and cases beside each other. An error about no case is about the folder.
    """

    examined: list[Examined]
    findings: list[Finding]

    @property
    def names(self) -> list[str]:
        """Of all cases, those included that are so wrong that they could not be examined."""
        return sorted({one.case.name for one in self.examined} | kept_out(self.findings))

    @property
    def usable(self) -> list[Case]:
        """The cases that no error keeps out, sorted by name."""
        out = kept_out(self.findings)
        return [one.case for one in self.examined if one.case.name not in out]


class Registry:
    """The registered data sets of a site; as a context manager it closes its file at the end.

    Parameters
    ----------
    path : the registry's file, made where there is none.

    Raises
    ------
    RunFolderError
        From every method: the file cannot be used, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = RegistryFile(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the use of the file."""
        self._file.close()

    def add(self, name: str, path: Path, layout: Layout | None = None, label_map: LabelMap | None = None) -> DataSet:
        """Register a folder and list its cases; nothing is examined yet.

        Raises
        ------
        UsageError
            The name is registered already or cannot be one.
        DataError
            The folder cannot be listed.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"data set {name!r}: expected a name of 1 to 63 letters, digits, _ . and - that starts with a letter "
                "or digit; choose another"
            )
        path = path.absolute()
        if not str(path).isprintable():
            raise UsageError(f"data set {name}: the path {str(path)!r} is not valid text; rename the folder")
        layout = layout or Layout()
        found = discover(path, layout)
        data_set = DataSet(
            name, path, layout, label_map, found.arrangement, time.time(), found.taken_for, found.without_patient
        )
        with self._file.transaction() as database:
            if database.execute("SELECT 1 FROM data_sets WHERE name = ?", (name,)).fetchone():
                raise UsageError(
                    f"data set {name}: registered already; choose another name, or forget it first with "
                    f"`wardround-site data remove {name}`"
                )
            database.execute(
                "INSERT INTO data_sets VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    name,
                    str(path),
                    rows.layout_text(layout),
                    rows.to_text(label_map.to_json()) if label_map else None,
                    found.arrangement,
                    rows.findings_text(found.findings),
                    data_set.added_at,
                ),
            )
            for case in found.cases:
                database.execute("INSERT INTO cases VALUES (?, ?, ?, ?, ?, ?)", (name, *rows.case_row(case)))
        return data_set

    def data_sets(self) -> list[DataSet]:
        """All data sets, sorted by name."""
        statement = "SELECT name, path, layout, label_map, arrangement, added_at FROM data_sets ORDER BY name"
        found = self._file.rows(statement)
        with self._parsing():
            return [_data_set(*row) for row in found]

    def get(self, name: str) -> DataSet:
        """One data set. Raises UsageError where there is none of this name."""
        found = {data_set.name: data_set for data_set in self.data_sets()}
        if name not in found:
            raise UsageError(
                f"data set {name!r}: not registered (registered: {', '.join(found) or 'none'}); correct the name, or "
                "register it with `wardround-site data add`"
            )
        return found[name]

    def cases(self, name: str) -> list[Case]:
        """The cases of a data set as they were last listed, sorted by name."""
        statement = "SELECT name, patient, images, label FROM cases WHERE data_set = ? ORDER BY name"
        found = self._file.rows(statement, self.get(name).name)
        with self._parsing():
            return [rows.case_of(*row) for row in found]

    def remove(self, name: str) -> None:
        """Forget a data set; its files stay. Raises UsageError where there is none of this name."""
        self.get(name)
        with self._file.transaction() as database:
            database.execute("DELETE FROM data_sets WHERE name = ?", (name,))

    def refresh(self, name: str) -> DataSet:
        """List the folder of a data set again; forget examinations of what has changed or gone.

        Raises
        ------
        DataError
            The folder cannot be listed any more.
        """
        data_set = self.get(name)
        found = discover(data_set.path, data_set.layout)
        stored = self._file.rows("SELECT name, patient, images, label, files FROM cases WHERE data_set = ?", name)
        known = {row[0]: row for row in stored}
        fresh = {case.name: rows.case_row(case) for case in found.cases}
        gone = {one for one, row in known.items() if one not in fresh or fresh[one][:4] != row[:4]}
        touched = [
            case for case in found.cases if case.name in known.keys() - gone and known[case.name] != fresh[case.name]
        ]
        valid = [(name, case.name, rows.to_text(self._valid(name, case))) for case in touched]
        with self._file.transaction() as database:
            changed = database.execute(
                "UPDATE data_sets SET arrangement = ?, findings = ? WHERE name = ?",
                (found.arrangement, rows.findings_text(found.findings), name),
            )
            if not changed.rowcount:
                raise UsageError(f"data set {name}: was removed meanwhile; register it again")
            database.executemany("DELETE FROM cases WHERE data_set = ? AND name = ?", [(name, one) for one in gone])
            database.executemany(
                "DELETE FROM examinations WHERE data_set = ? AND name = ? "
                "AND asked NOT IN (SELECT value FROM json_each(?))",
                valid,
            )
            database.executemany(
                "INSERT INTO cases VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET files = excluded.files",
                [(name, *row) for row in fresh.values()],
            )
        return replace(
            data_set,
            arrangement=found.arrangement,
            taken_for=found.taken_for,
            without_patient=found.without_patient,
        )

    def check(
        self, names: Sequence[str], study: Study | None = None, on_case: OnCase = lambda done, total: None
    ) -> Check:
        """List the folders again and examine what has not been examined, for a study or for any.

        Parameters
        ----------
        names : of data sets; where two have a case of one name, the cases are called `data set/case`.
        study : its modalities are looked for, and its classes.
        on_case : called before each case with the number of those done and of all.

        Raises
        ------
        DataError
            A folder cannot be listed, or a label map names other classes than the study.
        """
        requirements = Requirements.of(study) if study else None
        parts: list[tuple[DataSet, list[Case]]] = []
        findings: list[tuple[str, Finding]] = []
        for name in dict.fromkeys(names):
            data_set = self.refresh(name)
            if study is not None and data_set.label_map is not None:
                data_set.label_map.check(study.task.classes, name)
            parts.append((data_set, self.cases(name)))
            findings += [(name, finding) for finding in self._folder_findings(name)]
        total = sum(len(cases) for _, cases in parts)
        owners = Counter(case.name for _, cases in parts for case in cases)
        twice = {name for name, count in owners.items() if count > 1}
        examined: list[Examined] = []
        for data_set, cases in parts:
            for case in cases:
                on_case(len(examined), total)
                one = self._examine(data_set, case, requirements)
                examined.append(_renamed(one, f"{data_set.name}/{case.name}") if case.name in twice else one)
        found = [
            replace(finding, case=f"{name}/{finding.case}") if finding.case in twice else finding
            for name, finding in findings
        ]
        found += [finding for one in examined for finding in one.findings]
        facts = [one.facts for one in examined if one.facts is not None]
        found += examine_cases(facts, out=kept_out(found))
        if any(finding.code == Code.NO_FOREGROUND.code for finding in found):  # which says it of all labels at once
            found = [finding for finding in found if finding.code != Code.EMPTY_LABEL.code]
        if study is not None:
            found += _patients_in_both(examined, kept_out(found), study)
        return Check(sorted(examined, key=lambda one: one.case.name), list(dict.fromkeys(found)))

    def cases_for(
        self, study: Study, names: Sequence[str], on_case: OnCase = lambda done, total: None
    ) -> tuple[Mapping[int, int] | None, Check]:
        """What a study can train on, which is `usable` of the check.

        Returns
        -------
        label_map : stored value -> class; None where the values are the classes.
        check : with each case's images by the study's modalities ("" where it names none).

        Raises
        ------
        DataError
            A folder cannot be listed or has an error of its own, label maps differ between the data sets or from the
            study's classes, or fewer cases are left than the study asks for.
        """
        label_map = self.label_map_of(names)
        check = self.check(names, study, on_case)
        errors = [finding for finding in check.findings if finding.level == "error"]
        refusing = [finding for finding in errors if not finding.case]
        refusing += enough_cases(len(check.usable), len(check.names), study.cohort.minimum_cases)
        if refusing:
            causes = [f"\n  {finding.code} {finding.message}. {finding.advice}" for finding in errors if finding.case]
            more = f"\n  and {len(causes) - _CAUSES} more" if len(causes) > _CAUSES else ""
            where = ", ".join(f"{name} ({self.get(name).path})" for name in names)
            raise DataError(
                f"data {where}: {refusing[0].message}. {refusing[0].advice}{''.join(causes[:_CAUSES])}{more}"
            )
        return _classes(label_map), check

    def label_map_of(self, names: Sequence[str]) -> LabelMap | None:
        """The label map of several data sets together. Raises DataError where they have not one and the same."""
        maps = {name: self.get(name).label_map for name in names}
        first = next(iter(maps.values()), None)
        for name, label_map in maps.items():
            if _classes(label_map) != _classes(first):
                raise DataError(
                    f"data set {name}: its label map ({label_map or 'none'}) is not that of {next(iter(maps))} "
                    f"({first or 'none'}). Register both with the same map to use them in one study."
                )
        return first

    def _examine(self, data_set: DataSet, case: Case, requirements: Requirements | None) -> Examined:
        """From the file, or anew and into it."""
        registered = list(case.images)
        case = case if requirements is None else case.with_modalities(requirements.modalities)
        key = (data_set.name, case.name, rows.asked_mark(requirements, data_set.label_map))
        found = self._file.rows(
            "SELECT facts, findings FROM examinations WHERE data_set = ? AND name = ? AND asked = ?", *key
        )
        if found:
            with self._parsing():
                return Examined(case, rows.facts_of(found[0][0]), rows.findings_of(found[0][1]))
        classes = data_set.label_map.classes if data_set.label_map else None
        facts, findings = examine_case(case, requirements, classes, registered=registered)
        if facts is None:
            # What hindered the reading, such as rights or memory, may pass without a change of the files.
            return Examined(case, None, tuple(findings))
        with self._file.transaction() as database:
            # Unless the case went while it was read.
            database.execute(
                "INSERT OR REPLACE INTO examinations SELECT ?, ?, ?, ?, ? WHERE EXISTS "
                "(SELECT 1 FROM cases WHERE data_set = ? AND name = ?)",
                (*key, rows.facts_text(facts), rows.findings_text(findings), *key[:2]),
            )
        return Examined(case, facts, tuple(findings))

    def _valid(self, data_set: str, case: Case) -> list[str]:
        """What a case was examined for with files that still hold the same."""
        found = self._file.rows(
            "SELECT asked, facts FROM examinations WHERE data_set = ? AND name = ?", data_set, case.name
        )
        return [asked for asked, facts in found if rows.still_holds(case, facts)]

    def _folder_findings(self, name: str) -> tuple[Finding, ...]:
        found = self._file.rows("SELECT findings FROM data_sets WHERE name = ?", name)
        with self._parsing():
            return rows.findings_of(found[0][0]) if found else ()

    @contextmanager
    def _parsing(self) -> Iterator[None]:
        """A row that does not hold what was written to it is a damaged file."""
        try:
            yield
        except WardroundError:
            raise
        except Exception as error:
            raise self._file.damaged(error) from error


def _data_set(
    name: str, path: str, layout: str, label_map: str | None, arrangement: Arrangement, added_at: float
) -> DataSet:
    known = LabelMap.from_json(rows.from_text(label_map)) if label_map else None
    return DataSet(name, Path(path), rows.layout_of(layout), known, arrangement, added_at)


def _renamed(one: Examined, name: str) -> Examined:
    facts = replace(one.facts, name=name) if one.facts else None
    return Examined(replace(one.case, name=name), facts, tuple(replace(f, case=name) for f in one.findings))


def _patients_in_both(examined: Iterable[Examined], out: AbstractSet[str], study: Study) -> list[Finding]:
    """Of the cases that are not kept out: only these are trained and validated on."""
    sound = [one for one in examined if one.case.name not in out]
    _, validation = split_cases(
        [one.case for one in sound], study.evaluation, study.seed, independent=study.privacy.unit == "patient"
    )
    facts = [one.facts for one in sound if one.facts is not None]
    return patients_in_both(facts, {case.name for case in validation})


def _classes(label_map: LabelMap | None) -> Mapping[int, int] | None:
    return dict(label_map.classes) if label_map else None
