"""A site's label map: which class of the study each value stored in its labels means, as in `tumour: 4 -> 1`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import DataError, UsageError

_RULE = re.compile(r"(?:(?P<name>[^:]*\S)\s*:)?\s*(?P<value>-?[0-9]+)\s*->\s*(?P<index>-?[0-9]+)")
_LARGEST_VALUE = 2**31 - 1
_LARGEST_CLASS = 255


@dataclass(frozen=True)
class LabelMap:
    """Stored values and the classes they mean. A value that is not named is an error in a label, except 0.

    Attributes
    ----------
    classes : stored value -> class index.
    names : class index -> what the site calls it; compared with the study's classes.
    """

    classes: Mapping[int, int]
    names: Mapping[int, str]

    def check(self, classes: tuple[str, ...], data_set: str) -> None:
        """See that the names are those of a study's classes.

        Raises
        ------
        DataError
            A name is another class, or none, in the study.
        """
        for index, name in sorted(self.names.items()):
            if index >= len(classes) or classes[index].casefold() != name.casefold():
                found = f"is {classes[index]!r}" if index < len(classes) else "does not exist"
                raise DataError(
                    f"data set {data_set}: its label map calls class {index} {name!r}, but class {index} {found} in "
                    f"the study ({', '.join(f'{i} {known}' for i, known in enumerate(classes))}). Register the data "
                    "set again with the label map that this study needs."
                )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is the inverse."""
        return {
            "classes": {str(value): index for value, index in self.classes.items()},
            "names": {str(index): name for index, name in self.names.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> LabelMap:
        """The label map that was stored."""
        return cls(
            {int(value): int(index) for value, index in found["classes"].items()},
            {int(index): str(name) for index, name in found["names"].items()},
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{self.names[index]}: {value} -> {index}" if index in self.names else f"{value} -> {index}"
            for value, index in sorted(self.classes.items())
        )


def parse_label_map(texts: Iterable[str]) -> LabelMap | None:
    """Read rules such as `tumour: 4 -> 1` or `4 -> 1`; several in one text are separated by commas.

    Returns
    -------
    LabelMap, or None where there is no rule

    Raises
    ------
    UsageError
        A rule is none, a value is given twice or lies outside 0 to 2147483647, a class outside 0 to 255, or a name and
        a class are not one to one.
    """
    classes: dict[int, int] = {}
    names: dict[int, str] = {}
    for text in (part.strip() for given in texts for part in given.split(",")):
        match = _RULE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"label map {text!r}: expected 'value -> class' or 'name: value -> class', such as 'tumour: 4 -> 1'; "
                "put it into quotes, as the shell takes > for itself"
            )
        value, index, name = int(match["value"]), int(match["index"]), match["name"]
        if not 0 <= value <= _LARGEST_VALUE or not 0 <= index <= _LARGEST_CLASS:
            raise UsageError(
                f"label map {text!r}: expected a value from 0 to {_LARGEST_VALUE} and a class from 0 to "
                f"{_LARGEST_CLASS}; correct the number"
            )
        if value in classes:
            raise UsageError(
                f"label map {text!r}: the value {value} is mapped already, to {classes[value]}; remove one"
            )
        classes[value] = index
        if name is None:
            continue
        name = name.strip()
        if names.get(index, name) != name:
            raise UsageError(f"label map {text!r}: class {index} is called {names[index]!r} already; choose one name")
        if any(other != index and known == name for other, known in names.items()):
            raise UsageError(f"label map {text!r}: {name!r} is the name of another class already; correct one of them")
        names[index] = name
    return LabelMap(classes, names) if classes else None
