"""What a class is in the words of SNOMED CT, as DICOM-SEG states it for every segment.

A class whose name says what it is gets that code, any other "tissue"; codes that are given go before both. Source:
DICOM PS3.16, context groups CID 7150 (property categories) and CID 7151 (property types).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import UsageError


@dataclass(frozen=True)
class Code:
    """A coded concept: CodeValue, CodingSchemeDesignator ("SCT" is SNOMED CT) and CodeMeaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentCodes:
    """What kind of thing a segment is, and what thing."""

    category: Code
    type: Code


TISSUE = Code("85756007", "SCT", "Tissue")
ANATOMY = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
CATEGORIES: Mapping[str, Code] = {"tissue": TISSUE, "anatomy": ANATOMY, "abnormal": ABNORMAL}
"""The names by which a category is given."""

# The first expression that is found in a class's name decides: what is abnormal before the organ that it is in.
_KNOWN: tuple[tuple[str, Code, Code], ...] = (
    (r"o?edema", ABNORMAL, Code("79654002", "SCT", "Edema")),
    (r"necro", ABNORMAL, Code("6574001", "SCT", "Necrosis")),
    (r"tumou?r|neoplasm|cancer|carcinoma|glioma|metasta", ABNORMAL, Code("108369006", "SCT", "Neoplasm")),
    (r"ha?emorrhag|bleeding", ABNORMAL, Code("50960005", "SCT", "Hemorrhage")),
    (r"cyst", ABNORMAL, Code("367643001", "SCT", "Cyst")),
    (r"lesion|plaque|wmh", ABNORMAL, Code("52988006", "SCT", "Lesion")),
    (r"hippocamp", ANATOMY, Code("5366008", "SCT", "Hippocampus")),
    (r"liver", ANATOMY, Code("10200004", "SCT", "Liver")),
    (r"spleen", ANATOMY, Code("78961009", "SCT", "Spleen")),
    (r"kidney", ANATOMY, Code("64033007", "SCT", "Kidney")),
    (r"pancreas", ANATOMY, Code("15776009", "SCT", "Pancreas")),
    (r"prostate", ANATOMY, Code("41216001", "SCT", "Prostate")),
    (r"heart", ANATOMY, Code("80891009", "SCT", "Heart")),
    (r"lungs?(?![a-z])", ANATOMY, Code("39607008", "SCT", "Lung")),
    (r"brain", ANATOMY, Code("12738006", "SCT", "Brain")),
    (r"lymph.?node", ANATOMY, Code("59441001", "SCT", "Lymph Node")),
    (r"vessel", ANATOMY, Code("59820001", "SCT", "Blood Vessel")),
    (r"bone", ANATOMY, Code("272673000", "SCT", "Bone")),
    (r"cells?(?![a-z])", ANATOMY, Code("4421005", "SCT", "Cell")),
)
_GIVEN = re.compile(r"(?P<name>[^=]+)=(?:(?P<category>[a-z]+)/)?(?P<scheme>[^:]+):(?P<value>[^:]+):(?P<meaning>.+)")


def codes_of(class_name: str, given: Mapping[str, SegmentCodes] | None = None) -> SegmentCodes:
    """The codes of a class, by its name."""
    if given and class_name in given:
        return given[class_name]
    for pattern, category, kind in _KNOWN:
        if re.search(rf"(?<![a-z]){pattern}", class_name.lower()):
            return SegmentCodes(category, kind)
    return SegmentCodes(TISSUE, TISSUE)


def parse_codes(texts: Sequence[str], classes: Sequence[str]) -> dict[str, SegmentCodes]:
    """Codes as a user gives them, by class name.

    Parameters
    ----------
    texts : each `CLASS=[CATEGORY/]SCHEME:VALUE:MEANING`, such as `tumour=abnormal/SCT:393564001:Glioblastoma`; the
        category is one of `CATEGORIES`, and that of the class's name where it is left out.
    classes : the study's foreground.

    Raises
    ------
    UsageError : a text is of another form or names no class.
    """
    result = {}
    for text in texts:
        found = _GIVEN.fullmatch(text)
        if found is None or (found["category"] or "tissue") not in CATEGORIES:
            raise UsageError(
                f"--code {text!r}: expected CLASS=CATEGORY/SCHEME:VALUE:MEANING with a category of "
                f"{', '.join(CATEGORIES)}, such as 'tumour=abnormal/SCT:108369006:Neoplasm'; correct it"
            )
        if found["name"] not in classes:
            raise UsageError(f"--code {text!r}: the study's classes are {', '.join(classes)}; name one of these")
        if len(found["value"]) > 16 or len(found["scheme"]) > 16 or len(found["meaning"]) > 64:
            raise UsageError(
                f"--code {text!r}: DICOM holds 16 characters of scheme and value and 64 of the meaning; shorten it"
            )
        category = CATEGORIES[found["category"]] if found["category"] else codes_of(found["name"]).category
        kind = Code(found["value"], found["scheme"], found["meaning"])
        result[found["name"]] = SegmentCodes(category, kind)
    return result
