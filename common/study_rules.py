"""The rules of a study file's values: how one YAML node is read, what the error says instead, and how it is written.

A rule annotates a dataclass field; `common.study_reader` follows the annotations:

    filters: Annotated[int, Integer(1, 256)] = 16
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from yaml.nodes import Node, ScalarNode, SequenceNode


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a value: `suffix` points into a list, `found` overrides the node's own text."""

    expected: str
    node: Node
    suffix: str = ""
    found: str | None = None


class Refused(Exception):
    """A value is none of those its rule allows."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__()
        self.faults = faults


class Rule(Protocol):
    @property
    def expected(self) -> str:
        """What a reader of the error is told to write."""

    def read(self, node: Node) -> Any:
        """The value of `node`; raises Refused."""

    def write(self, value: Any) -> Any:
        """The inverse of `read`, as YAML prints it."""


class _Plain:
    """A rule whose values print as they are held."""

    __slots__ = ()

    def write(self, value: Any) -> Any:
        return value


_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _plain(node: Node, pattern: re.Pattern[str]) -> str | None:
    """The text of an unquoted scalar that matches `pattern`; YAML's own idea of its type is not consulted."""
    if isinstance(node, ScalarNode) and node.style is None and pattern.fullmatch(node.value):
        return str(node.value)
    return None


def _text(node: Node) -> str | None:
    if isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        return unicodedata.normalize("NFC", node.value)
    return None


@dataclass(frozen=True, slots=True)
class Integer(_Plain):
    minimum: int
    maximum: int = 1_000_000

    @property
    def expected(self) -> str:
        return "a positive integer" if self.minimum == 1 else f"an integer from {self.minimum} to {self.maximum}"

    def read(self, node: Node) -> int:
        text = _plain(node, _INTEGER)
        if text is None or int(text) < self.minimum:
            raise Refused(Fault(self.expected, node))
        if int(text) > self.maximum:
            raise Refused(Fault(f"an integer from {self.minimum} to {self.maximum}", node))
        return int(text)


@dataclass(frozen=True, slots=True)
class Number(_Plain):
    """A finite float. Bounds: `above` is excluded, `minimum` and `maximum` are included, `below` is excluded."""

    above: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None

    @property
    def expected(self) -> str:
        bounds = {"above": self.above, "of at least": self.minimum, "of at most": self.maximum, "below": self.below}
        return "a number " + " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    def read(self, node: Node) -> float:
        text = _plain(node, _NUMBER)
        value = math.nan if text is None else float(text) + 0.0  # + 0.0: -0.0 and 0.0 are one study, not two
        if (
            not math.isfinite(value)
            or (self.above is not None and value <= self.above)
            or (self.minimum is not None and value < self.minimum)
            or (self.maximum is not None and value > self.maximum)
            or (self.below is not None and value >= self.below)
        ):
            raise Refused(Fault(self.expected, node))
        return value


@dataclass(frozen=True, slots=True)
class Flag(_Plain):
    @property
    def expected(self) -> str:
        return "true or false"

    def read(self, node: Node) -> bool:
        if not isinstance(node, ScalarNode) or node.tag != "tag:yaml.org,2002:bool":
            raise Refused(Fault(self.expected, node))
        return node.value.lower() in ("true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Choice(_Plain):
    options: tuple[str | int, ...]

    @property
    def expected(self) -> str:
        *others, last = map(str, self.options)
        return f"{', '.join(others)} or {last}" if others else last

    def read(self, node: Node) -> str | int:
        number = _plain(node, _INTEGER)
        value = _text(node) if number is None else int(number)
        if value is None or value not in self.options:
            raise Refused(Fault(self.expected, node))
        return value


@dataclass(frozen=True, slots=True)
class Text(_Plain):
    pattern: str
    expected: str

    def read(self, node: Node) -> str:
        text = _text(node)
        if text is None and isinstance(node, ScalarNode) and re.fullmatch(self.pattern, node.value):
            raise Refused(Fault(f'{self.expected} (write "{node.value}", in quotes, if it is one)', node))
        if text is None or not re.fullmatch(self.pattern, text) or not text.isprintable():
            raise Refused(Fault(self.expected, node))
        return text


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds, written as hours, minutes and seconds: 90s, 20m, 1h30m."""

    longest: float = 720 * 3600.0

    @property
    def expected(self) -> str:
        return f"a duration such as 90s, 20m or 1h30m, above 0 and of at most {self.longest / 3600:g}h"

    def read(self, node: Node) -> float:
        match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,3})?)s)?", _text(node) or "")
        hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
        total = round(hours * 3600 + minutes * 60 + seconds, 3)
        if not 0 < total <= self.longest:
            raise Refused(Fault(self.expected, node))
        return total

    def write(self, value: float) -> str:
        if value != int(value):
            return f"{value:.3f}s"
        minutes, seconds = divmod(int(value), 60)
        hours, minutes = divmod(minutes, 60)
        return "".join(f"{n}{unit}" for n, unit in ((hours, "h"), (minutes, "m"), (seconds, "s")) if n)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list held as a tuple; names in it are unique. `order` sorts what has no order of its own."""

    item: Integer | Number | Choice | Text
    what: str
    at_least: int = 0
    at_most: int = 1000
    order: Callable[[Any], Any] | None = None

    @property
    def expected(self) -> str:
        if not self.at_least:
            return f"a list of {self.what} ([] for none)"
        return f"a list of {self.at_least} to {self.at_most} {self.what}"

    def read(self, node: Node) -> tuple[Any, ...]:
        if not isinstance(node, SequenceNode) or not self.at_least <= len(node.value) <= self.at_most:
            raise Refused(Fault(self.expected, node))
        values: list[Any] = []
        faults: list[Fault] = []
        for index, child in enumerate(node.value):
            try:
                value = self.item.read(child)
            except Refused as refused:
                faults += [Fault(f.expected, f.node, f"[{index}]", f.found) for f in refused.faults]
                continue
            if value in values and not isinstance(self.item, Integer | Number):
                faults.append(Fault("every name once", child, f"[{index}]", f"{shown(child)} again"))
            values.append(value)
        if faults:
            raise Refused(*faults)
        return tuple(values) if self.order is None else tuple(sorted(values, key=self.order))

    def write(self, value: tuple[Any, ...]) -> list[Any]:
        return Flow(value)


class Flow(list[Any]):
    """A list that YAML prints on one line."""


@dataclass(frozen=True, slots=True)
class Key:
    """The key in the file, where it is not the field's name."""

    name: str


@dataclass(frozen=True, slots=True)
class When:
    """The key belongs to some values of another one, None for null; it is refused with others, and holds 0.0 there."""

    selector: str
    values: tuple[str | None, ...]
    default: float


@dataclass(frozen=True, slots=True)
class Absent:
    """The section may be left out, and then means these keys."""

    keys: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Derived:
    """The key may be left out; a relation fills it in from others."""


@dataclass(frozen=True, slots=True)
class Later:
    """The key is younger than studies that were run: at its default it is left out of the canonical text.

    So the digests of those studies stay what they were.
    """


# Nodes. ------------------------------------------------------------------------------------------------------------


def is_null(node: Node) -> bool:
    """Whether the node is `null`, or nothing at all."""
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def shown(node: Node) -> str:
    """A node as the file has it, short enough for a message."""
    if is_null(node):
        return "nothing"
    if isinstance(node, SequenceNode) and all(isinstance(item, ScalarNode) for item in node.value):
        text = f"[{', '.join(shown(item) for item in node.value)}]"
    elif isinstance(node, ScalarNode):
        text = str(node.value)
        if not text.isprintable() or not text:
            text = repr(text)
        elif node.style in ("'", '"'):
            text = f'"{text}"'
    else:
        return "a list" if isinstance(node, SequenceNode) else "keys and values"
    return text if len(text) <= 80 else text[:77] + "..."
