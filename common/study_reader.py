"""Reads a YAML file into nested frozen dataclasses whose annotations are its rules, and writes them again.

A field is a key, its type and annotations (`common.study_rules`) say what it may hold, and its default is what an
absent key means. Relations are functions of everything that was `Found`, for rules that span several keys. Whatever is
wrong is collected, and raised as one error with a line for each problem.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from common.errors import StudyError, WardroundError
from common.study_rules import (
    Absent,
    Choice,
    Derived,
    Flag,
    Flow,
    Key,
    Later,
    Refused,
    Rule,
    When,
    is_null,
    shown,
)

_Section = TypeVar("_Section")


class Found:
    """What was read so far: values and nodes by their path ("training.rounds"), and the problems by line.

    Parameters
    ----------
    root : the dataclass of the whole file.
    source : what messages call the file.
    what : what kind of file it is.
    """

    def __init__(self, root: type, source: str, what: str = "study file") -> None:
        self.root = root
        self.source = source
        self.what = what
        self.values: dict[str, Any] = {}
        self.nodes: dict[str, Node] = {}
        self.problems: list[tuple[int, str]] = []

    def problem(self, line: int, path: str, message: str) -> None:
        """Notes a problem."""
        self.problems.append((line, f"{path}: {message} ({self.source}:{line})"))

    def refuse(self, path: str, node: Node, expected: str, found: str | None = None) -> None:
        """Notes that the value at `path` is not what is expected."""
        self.problem(_line(node), path, f"expected {expected}, found {found or shown(node)}")

    def known(self, *paths: str) -> list[Any] | None:
        """The values at `paths`, or None if one of them was refused or is absent."""
        return [self.values[path] for path in paths] if all(path in self.values for path in paths) else None


def read(
    root: type[_Section],
    text: str,
    source: str,
    relations: Iterable[Callable[[Found], None]] = (),
    *,
    what: str = "study file",
    error: type[WardroundError] = StudyError,
) -> _Section:
    """Parses a file into `root`; `what` it is called in messages. Raises `error` with a line for each problem."""
    node = _compose(root, text, source, what, error)
    found = Found(root, source, what)
    _read_section(root, "", node, found)
    for relation in relations:
        relation(found)
    if found.problems:
        raise error("\n".join(message for _, message in sorted(found.problems, key=lambda problem: problem[0])))
    built = _build(root, "", found.values)
    assert isinstance(built, root)
    return built


def canonical(section: object) -> str:
    """Canonical JSON, every default resolved: files that mean the same give the same text."""
    return json.dumps(_tree(section, printed=False), sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_yaml(section: object) -> str:
    """YAML, every default resolved; `read` gives an equal value."""
    return yaml.dump(_tree(section, printed=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


# Sections. ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Field:
    """One key of a section, as its dataclass field declares it."""

    name: str
    key: str
    rule: Rule | None
    section: type | None
    default: Any
    when: When | None
    absent: Absent | None
    derived: bool
    later: bool


@cache
def _fields_of(section: type) -> dict[str, _Field]:
    hints = get_type_hints(section, include_extras=True)
    result = {}
    for declared in fields(section):
        base, *notes = (
            get_args(hints[declared.name]) if get_origin(hints[declared.name]) is Annotated else [hints[declared.name]]
        )
        rule = next((note for note in notes if hasattr(note, "read")), None)
        if get_origin(base) is Literal:
            rule = Choice(get_args(base))
        elif base is bool:
            rule = Flag()
        key = next((note.name for note in notes if isinstance(note, Key)), declared.name)
        result[key] = _Field(
            name=declared.name,
            key=key,
            rule=rule,
            section=base if isinstance(base, type) and is_dataclass(base) else None,
            default=declared.default,
            when=_note(notes, When),
            absent=_note(notes, Absent),
            derived=_note(notes, Derived) is not None,
            later=_note(notes, Later) is not None,
        )
    return result


_Note = TypeVar("_Note")


def _note(notes: list[Any], kind: type[_Note]) -> _Note | None:
    return next((note for note in notes if isinstance(note, kind)), None)


def _paths(section: type, prefix: str = "") -> Iterator[str]:
    for key, known in _fields_of(section).items():
        yield prefix + key
        if known.section:
            yield from _paths(known.section, f"{prefix}{key}.")


def _read_section(section: type, path: str, node: Node, found: Found, line: int = 1) -> None:
    known = _fields_of(section)
    prefix = f"{path}." if path else ""
    given = _given(node, known, path, prefix, found)
    if given is None:
        return
    for key, declared in known.items():
        _read_key(declared, prefix + key, given.get(key), found, line)
    for key, declared in known.items():
        if declared.when is not None:
            _read_conditional(declared, declared.when, prefix, prefix + key, given.get(key), found)


def _given(
    node: Node, known: dict[str, _Field], path: str, prefix: str, found: Found
) -> dict[str, tuple[Node, Node]] | None:
    """The known keys of a section with their nodes; unknown and repeated ones become problems."""
    if not isinstance(node, MappingNode):
        found.refuse(path or found.what, node, f"keys and values ({', '.join(known)})")
        return None
    given: dict[str, tuple[Node, Node]] = {}
    for key_node, value in node.value:
        key = str(key_node.value) if isinstance(key_node, ScalarNode) else None
        if key in given:
            first = _line(given[key][0])
            found.problem(_line(key_node), prefix + key, f"given twice, first in line {first}; remove one")
        elif key in known:
            given[key] = (key_node, value)
        elif key == "<<":
            found.problem(_line(key_node), f"{prefix}<<", "merge keys are not read; write the keys out")
        else:
            near = difflib.get_close_matches(key or "", known, n=1)
            elsewhere = [other for other in _paths(found.root) if other.rpartition(".")[2] == key]
            guess = f"; did you mean {(near or elsewhere)[0]}?" if near or elsewhere else "."
            message = f"unknown key{guess} Known here: {', '.join(known)}"
            found.problem(_line(key_node), prefix + shown(key_node), message)
    return given


def _read_key(declared: _Field, path: str, given: tuple[Node, Node] | None, found: Found, line: int) -> None:
    if given is not None:
        key_node, node = given
        found.nodes[path] = node
        if declared.section is not None:
            if declared.absent is not None and is_null(node):  # a section whose keys are all commented out
                node = _mapping(declared.absent.keys)
            _read_section(declared.section, path, node, found, _line(key_node))
        elif declared.rule is not None:
            if declared.default is None and is_null(node):
                found.values[path] = None
                return
            try:
                found.values[path] = declared.rule.read(node)
            except Refused as refused:
                for fault in refused.faults:
                    found.refuse(path + fault.suffix, fault.node, fault.expected, fault.found)
    elif declared.section is not None and declared.absent is not None:
        _read_section(declared.section, path, _mapping(declared.absent.keys), found)
    elif declared.default is not MISSING:
        found.values[path] = declared.default
    elif not declared.derived and declared.when is None:
        known = declared.section and f"keys and values ({', '.join(_fields_of(declared.section))})"
        expected = known or (declared.rule.expected if declared.rule else "a value")
        found.problem(line, path, f"missing; expected {expected}")


def _read_conditional(
    declared: _Field, when: When, prefix: str, path: str, given: tuple[Node, Node] | None, found: Found
) -> None:
    if prefix + when.selector not in found.values:  # refused, or missing
        return
    chosen = found.values[prefix + when.selector]
    if chosen in when.values:
        if given is None:
            found.values[path] = when.default
    else:
        if given is not None:
            owners = " or ".join(f"{when.selector}: null" if value is None else value for value in when.values)
            found.refuse(path, given[1], f"no value with {when.selector}: {chosen} (it belongs to {owners})")
        found.values[path] = 0.0


def _build(section: type, path: str, values: dict[str, Any]) -> object:
    arguments = {}
    for key, declared in _fields_of(section).items():
        below = f"{path}.{key}" if path else key
        arguments[declared.name] = _build(declared.section, below, values) if declared.section else values[below]
    built: object = section(**arguments)
    return built


def _tree(section: Any, printed: bool) -> dict[str, Any]:
    """A section as plain data, without the keys that its choices rule out; `printed`: as the YAML file says it."""
    tree: dict[str, Any] = {}
    kind: type = type(section)
    for key, declared in _fields_of(kind).items():
        value = getattr(section, declared.name)
        if declared.when is not None and getattr(section, declared.when.selector) not in declared.when.values:
            continue
        if declared.later and not printed and value == declared.default:
            continue
        if declared.section is not None:
            tree[key] = _tree(value, printed)
        else:
            tree[key] = declared.rule.write(value) if printed and declared.rule and value is not None else value
    return tree


# YAML. -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Composes nodes, and refuses anchors, aliases and tags: a value is what stands where it is read."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
            problem = "anchors, aliases and tags (&, * and !) are not read; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Flow, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def _compose(root: type, text: str, source: str, what: str, failure: type[WardroundError]) -> Node:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        fault = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = f"the character {chr(error.character)!r} is not allowed"
    except (ValueError, OverflowError, RecursionError) as error:
        line = loader.line + 1 if loader else 1
        fault = (
            "nested too deeply" if isinstance(error, RecursionError) else 'an escape such as "\\U" names no character'
        )
    else:
        if node is not None:
            return node
        raise failure(f"{what}: expected keys and values ({', '.join(_fields_of(root))}), found none ({source}:1)")
    raise failure(f"{what}: not readable as YAML: {fault} ({source}:{line})")


def _mapping(keys: Mapping[str, str | float]) -> Node:
    node = yaml.compose(yaml.safe_dump(dict(keys)), Loader=yaml.SafeLoader)
    assert node is not None
    return node


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
