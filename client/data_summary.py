"""What a check found about a data set as a whole: what is usable, what keeps cases out, what the images are like."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from common.imaging.checks import CaseFacts, Finding, ImageFacts, Requirements, enough_cases, kept_out
from common.imaging.facts import SourceFacts
from common.wording import counted

STAYS_HERE = "This report stays on this machine: nothing of it is sent anywhere."
_STATISTICS = ("minimum", "p01", "mean", "std", "p99", "maximum")
_MOST_VALUES = 16


@dataclass(frozen=True)
class Spread:
    """The lowest, the middle and the highest of one figure over the cases."""

    lowest: float
    median: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1])


@dataclass(frozen=True)
class Summary:
    """All images of one modality, or all labels.

    Attributes
    ----------
    what : "image", "image T1post" or "label".
    count : how many there are.
    formats, dtypes, channels : value -> how many have it, the most frequent first.
    shape, spacing : along z, y and x, as stored.
    intensity : by the statistic's name; empty for labels.
    values : for labels: stored value -> how many labels have it, of the 16 lowest values.
    different : for labels: how many different values one holds; None for images.
    """

    what: str
    count: int
    formats: dict[str, int]
    dtypes: dict[str, int]
    channels: dict[str, int]
    shape: tuple[Spread, ...]
    spacing: tuple[Spread, ...]
    intensity: dict[str, Spread]
    values: dict[str, int]
    different: Spread | None


@dataclass(frozen=True)
class DataReport:
    """The result of a check.

    Attributes
    ----------
    name : the data set's.
    requirements : of the study it was checked for; None for the check that every study would ask.
    cases : the names of all cases, sorted.
    facts : of the cases that could be read.
    findings : errors first, then by code, case, file and message: equal checks are in equal order.
    split : how many of the usable cases train in the study, and how many validate; None without one.
    absent : the study's modalities that no case has.
    about : what was checked, and how it is read, as lines of a name and a text.

    All of it stays at the site: names of cases and files may be those of patients.
    """

    name: str
    requirements: Requirements | None
    cases: tuple[str, ...]
    facts: tuple[CaseFacts, ...]
    findings: tuple[Finding, ...]
    split: tuple[int, int] | None = None
    absent: tuple[str, ...] = ()
    about: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        cases: Iterable[str],
        facts: Iterable[CaseFacts],
        findings: Iterable[Finding],
        requirements: Requirements | None = None,
        split: tuple[int, int] | None = None,
        absent: Iterable[str] = (),
        about: Iterable[tuple[str, str]] = (),
    ) -> DataReport:
        """The report of a check; says itself where fewer cases are left than the study asks for."""
        names = tuple(sorted(cases))
        found = list(findings)
        if requirements is not None:
            usable = len(set(names) - kept_out(found))
            found += enough_cases(usable, len(names), requirements.minimum_cases)
        ordered = sorted(set(found), key=lambda one: (one.level, *astuple(one)))
        by_name = tuple(sorted(facts, key=lambda case: case.name))
        return cls(name, requirements, names, by_name, tuple(ordered), split, tuple(absent), tuple(about))

    @property
    def kept_out(self) -> tuple[str, ...]:
        """The cases that an error keeps out, sorted."""
        out = kept_out(self.findings)
        return tuple(name for name in self.cases if name in out)

    @property
    def usable(self) -> tuple[str, ...]:
        """The other cases, sorted."""
        out = kept_out(self.findings)
        return tuple(name for name in self.cases if name not in out)

    @property
    def is_fit(self) -> bool:
        """Whether there are usable cases, and no error is about the data set as a whole."""
        return bool(self.usable) and not any(f.level == "error" and not f.case for f in self.findings)

    @property
    def by_code(self) -> dict[str, int]:
        """How often each code was found, errors first."""
        return dict(Counter(finding.code for finding in self.findings))

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        out = f"{len(self.kept_out)} kept out by errors" if self.kept_out else "none kept out"
        return f"{len(self.usable)} of {counted(len(self.cases), 'case')} usable, {out}."

    @property
    def verdict(self) -> str:
        """What follows from it, in one sentence; in two where no case has what the study names."""
        missing = f" Missing from every case: {', '.join(self.absent)}." if self.absent else ""
        if self.requirements:
            return f"The study {'can use it' if self.is_fit else 'cannot use it as it is'}.{missing}"
        return "It can be used." if self.is_fit else "This data set cannot be used as it is."

    def summaries(self) -> list[Summary]:
        """One for each modality, in order, and one for the labels."""
        modalities = sorted({modality for case in self.facts for modality in case.images})
        found = [
            _summary(
                f"image {modality}".strip(),
                [case.images[modality] for case in self.facts if modality in case.images],
            )
            for modality in modalities
        ]
        labels = [case.label for case in self.facts if case.label is not None]
        if labels:
            values = Counter(value for label in labels for value in label.counts)
            found.append(_summary("label", labels, values, Spread.of(label.values for label in labels)))
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON object, described in `docs/checks.md`."""
        return {
            "format": "wardround.data-report/1",
            "data_set": self.name,
            "requirements": asdict(self.requirements) if self.requirements else None,
            "fit": self.is_fit,
            "counts": {
                "cases": len(self.cases),
                "usable": len(self.usable),
                "kept_out": len(self.kept_out),
                "training": self.split[0] if self.split else None,
                "validation": self.split[1] if self.split else None,
                "errors": sum(finding.level == "error" for finding in self.findings),
                "warnings": sum(finding.level == "warning" for finding in self.findings),
                "by_code": self.by_code,
            },
            "kept_out": list(self.kept_out),
            "absent": list(self.absent),
            "findings": [finding.to_json() for finding in self.findings],
            "summaries": [asdict(summary) for summary in self.summaries()],
            "cases": [case.to_json() for case in self.facts],
        }


def describe_requirements(requirements: Requirements) -> str:
    """What the study asks for, in one line."""
    asked = [f"{requirements.dimensions}D"]
    if requirements.modalities:
        missing = " (a missing one is zero)" if requirements.missing_modality == "zero" else ""
        asked.append(f"{', '.join(requirements.modalities)}{missing}")
    else:
        asked.append(counted(requirements.channels, "channel"))
    asked.append(f"{requirements.labels}: {', '.join(requirements.classes)}")
    least = requirements.minimum_cases
    asked.append("all cases sound" if least is None else f"at least {counted(least, 'case')}")
    return "; ".join(asked)


def describe_split(report: DataReport) -> str:
    """How many cases train and validate, as a sentence that follows another one; "" where none does."""
    if report.split is None or not report.is_fit:
        return ""
    training, validation = report.split
    return f" Of the usable cases, {training} train and {validation} validate."


def _summary(
    what: str, sources: Sequence[SourceFacts], values: Mapping[int, int] | None = None, different: Spread | None = None
) -> Summary:
    images = [source for source in sources if isinstance(source, ImageFacts)]
    return Summary(
        what=what,
        count=len(sources),
        formats=_frequencies(source.format for source in sources),
        dtypes=_frequencies(source.dtype for source in sources),
        channels=_frequencies(str(source.channels) for source in sources),
        shape=tuple(Spread.of(source.shape[axis] for source in sources) for axis in range(3)),
        spacing=tuple(Spread.of(source.spacing[axis] for source in sources) for axis in range(3)),
        intensity={name: Spread.of(getattr(image, name) for image in images) for name in _STATISTICS if images},
        values={str(value): (values or {})[value] for value in sorted(values or {})[:_MOST_VALUES]},
        different=different,
    )


def _frequencies(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
