"""What a user may say about a folder: how its images are called, which of them are labels, whose they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from common.errors import UsageError
from common.imaging.case import Case, Source
from common.imaging.findings import Finding

# How hospitals write "contrast agent", in the languages that are met, with or without what it is made of.
_AGENT = r"(i\.?v\.?[\W_]*)?(contrast|contrasto|contraste|kontrast|km|gado\w*|gad|gd|ce|c)(?![a-z])"
_WITHOUT = r"(?<![a-z])(w/o|w\.o\.?|wo|without|no|non|sans|sin|senza|ohne|vor|avant)(?![a-z])[\W_]*"
# The first that is found in a series' description decides; the order tells "T2 FLAIR" from T2, and T1 with contrast
# agent from T1. What says no more than T1 is T1 without. None: it may be several, or is another contrast, and is not
# guessed.
_DEFAULT_RULES: tuple[tuple[str | None, str], ...] = (
    (None, r"(?<![a-z])(dwi|adc|dti|swi|swan|dsc|dce|trace)(?![a-z])"),
    (None, r"t1.*flair|flair.*t1"),
    ("FLAIR", r"flair"),
    (
        None,
        r"t1.*((?<![a-z0-9])w(ith)?[\W_]*(and|&|\+|/|und)?[\W_]*w(/?o|ithout)(?![a-z])|pre[\W_]*(and|&|\+|/)?[\W_]*post)",
    ),
    (None, r"t[12]\w*[\W_]*map|t2w?[\W_]*(\*|star)"),
    (
        "T1pre",
        rf"t1.*{_WITHOUT}{_AGENT}|{_WITHOUT}{_AGENT}.*t1|t1.*(w/o|without|nativ|unenhanced|non?[\W_]*(enh|contr))"
        r"(?![\W_]*(fs|fat))",
    ),
    (
        "T1pre",
        r"t1.*(?<![a-vx-z])pre(?![a-z])|t1.*pre[\W_]*(contr|kontr|gd|gad|km)|(?<![a-z])pre(?![a-z]).{0,12}t1"
        r"|(?<![a-z])pre[\W_]*(contr|kontr|gd|gad|km).{0,12}t1",
    ),
    ("T1pre", r"t1.*[\s_(]-c(?![a-z]|[\W_]*sp)|t1w?[\W_]*c-(?=$|[\s_.)])"),
    (None, r"t1w?\s*-\s*c(?![a-z+]|[\W_]*sp)"),  # a minus or a hyphen
    (
        "T1post",
        r"t1w?[\W_]*c(e|\+)?(?![a-z]|[\W_]*sp)|t1.*(?<![a-z])(ce|km)(?![a-z])"
        r"|t1.*(post(?!er)|\+|(?<![a-vx-z])(gd|gad)|contr|kontr|enhanced)"
        r"|((?<![a-z])post(?!er)|(?<![a-z])(gd|gad|ce|km)|\+c).{0,12}t1",
    ),
    ("T1pre", r"(?<![a-z0-9])t1(?![0-9])"),
    ("T2", r"(?<![a-z0-9])t2(?![0-9])"),
    ("CT", r"(?<![a-z0-9])ct(?![a-z0-9])"),
)
_DEFAULT_LABEL = r"(?<![a-z])(mask|masks|segm|seg|label|labels|segmentation|gt)(?![a-z])|mask.?tumou?r|tumou?r.?mask"
LABEL = "label"
"""What a description is taken for that is a label's; no modality can be called so."""
_MODALITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")  # as task.modalities of a study


@dataclass(frozen=True)
class Layout:
    """How to understand a folder, where names and headers do not say it by themselves.

    Attributes
    ----------
    channel_map : modality -> regular expression, searched in the description of a DICOM series or the part of a file
        name that tells a case's images apart, whatever the case of letters. Goes before the built-in rules for T1pre,
        T1post, T2, FLAIR and CT, and in place of the one of the same name, whatever the capitals.
    label : regular expression of the descriptions, files or folders that are labels; "" for the built-in one.
    patient_pattern : regular expression whose first group is the patient, searched in the case's name, or in the
        folders of a DICOM series; "" where DICOM's PatientID, a table or the case's own name says it.
    level : of the pyramids that the images and labels are, 0 for the full resolution; all are read at it.

    Raises
    ------
    UsageError
        An expression is none, a modality has a name that no study can have, the patient's has no group, or the
        level is below 0.
    """

    channel_map: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    label: str = ""
    patient_pattern: str = ""
    level: int = 0

    def __post_init__(self) -> None:
        for modality, pattern in self.channel_map.items():
            if not _MODALITY.fullmatch(modality):
                raise UsageError(
                    f"channel map {modality!r}: expected a modality's name of 1 to 32 letters, digits, _ . and -, such "
                    "as T1post; correct it"
                )
            _compiled(f"channel map {modality}", pattern)
        if self.label:
            _compiled("label pattern", self.label)
        if self.patient_pattern and not _compiled("patient pattern", self.patient_pattern).groups:
            raise UsageError(
                f"patient pattern {self.patient_pattern!r}: no group says which part is the patient; put it into "
                "parentheses, such as '^(P[0-9]+)_'"
            )

        if self.level < 0:
            raise UsageError(
                f"level {self.level}: expected 0 for the full resolution, or the number of a smaller level of a "
                "pyramid; correct it"
            )

    def source(self, path: Path, series: str = "") -> Source:
        """Where an image or label lies, at the level that is wanted."""
        return Source(path, series, self.level)

    def names(self, modality: str) -> bool:
        """Whether the channel map says which images are this modality; as in studies, capitals do not count."""
        return modality.casefold() in {known.casefold() for known in self.channel_map}

    def modality_of(self, description: str) -> str | None:
        """The modality that a description speaks of, or None where no rule finds one."""
        own = self.channel_map.items()
        others = [rule for rule in _DEFAULT_RULES if rule[0] is None or not self.names(rule[0])]
        return next((name for name, pattern in [*own, *others] if re.search(pattern, description, re.IGNORECASE)), None)

    def is_label(self, description: str) -> bool:
        """Whether a description or file name is a label's."""
        return re.search(self.label or _DEFAULT_LABEL, description, re.IGNORECASE) is not None

    def patient_in(self, name: str) -> str | None:
        """The patient whom the pattern finds in a name, or None."""
        found = re.search(self.patient_pattern, name) if self.patient_pattern else None
        return (found.group(1) or None) if found else None


@dataclass(frozen=True)
class Found:
    """What one way of looking at a folder gave.

    Attributes
    ----------
    cases, findings
    taken_for : what each image or label calls itself, and its modality, `LABEL`, or "" for none of them; where names or
        descriptions decide.
    without_patient : where the pattern of patients was looked for and found none.
    """

    cases: list[Case] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    taken_for: list[tuple[str, str]] = field(default_factory=list)
    without_patient: list[str] = field(default_factory=list)


def _compiled(what: str, pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise UsageError(f"{what}: expected a regular expression, found nothing; write what its names have in common")
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"{what}: {pattern!r} is not a regular expression ({error}); put a backslash before . + * ( ) [ ] where "
            "they are meant literally"
        ) from error
