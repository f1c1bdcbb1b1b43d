"""The study file: YAML, parsed once into frozen dataclasses. Everything that decides a result is in here.

The dataclasses below are the format: a field is a key, its type and annotations are the rules, and its default is what
an absent key means. `_RELATIONS` holds the rules that span several keys. Whatever is wrong with a file is reported at
once, a line for each problem, in one `StudyError`:

    >>> parse_study(text.replace("rounds: 24", "rounds: -3"), source="studies/nuclei.yaml")
    StudyError: training.rounds: expected a positive integer, found -3 (studies/nuclei.yaml:12)

YAML is read strictly: only plain decimal numbers are numbers (`1e-3` is one, `1:30` and `0x10` are not), `no` and `on`
are never names, and keys given twice, anchors, aliases, tags and merge keys are refused.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from common.errors import StudyError

MODEL_NAMES = ("unet",)
AUGMENTATIONS = (
    "flip",
    "rotate",
    "scale",
    "gamma",
    "contrast",
    "noise",
    "blur",
    "elastic",
    "brightness",
    "contrast_stretch",
    "gamma_inverted",
    "low_resolution",
    "color_jitter",
    "illumination",
    "cutout",
)
VARIANTS = ("float32", "float16", "dynamic_range", "int8")
HOLDOUT = "holdout"

# Rules: how one value is read. -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fault:
    """One thing wrong with a value: `suffix` points into a list, `found` overrides the node's own text."""

    expected: str
    node: Node
    suffix: str = ""
    found: str | None = None


class _Refused(Exception):
    def __init__(self, *faults: _Fault) -> None:
        super().__init__()
        self.faults = faults


class _Rule(Protocol):
    @property
    def expected(self) -> str:
        """What a reader of the error is told to write."""

    def read(self, node: Node) -> Any:
        """The value of `node`; raises _Refused."""

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


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


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
            raise _Refused(_Fault(self.expected, node))
        if int(text) > self.maximum:
            raise _Refused(_Fault(f"an integer from {self.minimum} to {self.maximum}", node))
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
            raise _Refused(_Fault(self.expected, node))
        return value


@dataclass(frozen=True, slots=True)
class Flag(_Plain):
    @property
    def expected(self) -> str:
        return "true or false"

    def read(self, node: Node) -> bool:
        if not isinstance(node, ScalarNode) or node.tag != "tag:yaml.org,2002:bool":
            raise _Refused(_Fault(self.expected, node))
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
            raise _Refused(_Fault(self.expected, node))
        return value


@dataclass(frozen=True, slots=True)
class Text(_Plain):
    pattern: str
    expected: str

    def read(self, node: Node) -> str:
        text = _text(node)
        if text is None and isinstance(node, ScalarNode) and re.fullmatch(self.pattern, node.value):
            raise _Refused(_Fault(f'{self.expected} (write "{node.value}", in quotes, if it is one)', node))
        if text is None or not re.fullmatch(self.pattern, text) or not text.isprintable():
            raise _Refused(_Fault(self.expected, node))
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
            raise _Refused(_Fault(self.expected, node))
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
            raise _Refused(_Fault(self.expected, node))
        values: list[Any] = []
        faults: list[_Fault] = []
        for index, child in enumerate(node.value):
            try:
                value = self.item.read(child)
            except _Refused as refused:
                faults += [_Fault(f.expected, f.node, f"[{index}]", f.found) for f in refused.faults]
                continue
            if value in values and not isinstance(self.item, Integer | Number):
                faults.append(_Fault("every name once", child, f"[{index}]", f"{_shown(child)} again"))
            values.append(value)
        if faults:
            raise _Refused(*faults)
        return tuple(values) if self.order is None else tuple(sorted(values, key=self.order))

    def write(self, value: tuple[Any, ...]) -> list[Any]:
        return _Flow(value)


class _Flow(list[Any]):
    """A list that YAML prints on one line."""


@dataclass(frozen=True, slots=True)
class Key:
    """The key in the file, where it is not the field's name."""

    name: str


@dataclass(frozen=True, slots=True)
class When:
    """The key belongs to some values of another one: refused with the others, where the field holds 0.0."""

    selector: str
    values: tuple[str, ...]
    default: float


@dataclass(frozen=True, slots=True)
class Absent:
    """The section may be left out, and then means these keys."""

    keys: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Derived:
    """The key may be left out; one of `_RELATIONS` fills it in from others."""


_NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
_STUDY_NAME = Text(_NAME, "a name of 1 to 63 lower-case letters, digits, - and _ that starts with a letter or digit")
_CLASS_NAME = Text(r"\S(.{0,61}\S)?", "a class name of 1 to 63 printable characters")
_MODALITY = Text(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", "a modality's name of 1 to 32 letters, digits, _ . and -, such as T1post or CT"
)
_SITE_NAME = Text(
    rf"(?!(?i:{HOLDOUT})$)[A-Za-z0-9][A-Za-z0-9_.-]{{0,62}}",
    "a site name of 1 to 63 letters, digits, _ . and - that starts with a letter or digit and is not "
    f'"{HOLDOUT}", the coordinator\'s own folder',
)
_SIZES = ListOf(Integer(1, 65536), "sizes in voxels, ordered (z,) y, x", at_least=2, at_most=3)
_SEED_LIMIT = 2**31 - 1

# The format. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is segmented: images of `dimensions` axes and `channels` channels; class i is label value i.

    With labels "instances" every label value above 0 is one object of the only foreground class. `modalities` names
    the images of a case that become its channels, in this order, one channel each; () is one image a case. A case
    without one of them is kept out ("error") or gets a channel of zeros ("zero").
    """

    dimensions: Literal[2, 3]
    channels: Annotated[int, Integer(1, 16)]
    classes: Annotated[tuple[str, ...], ListOf(_CLASS_NAME, "class names, background first", at_least=2, at_most=256)]
    labels: Literal["classes", "instances"] = "classes"
    modalities: Annotated[tuple[str, ...], ListOf(_MODALITY, "modalities", at_most=16)] = ()
    missing_modality: Literal["error", "zero"] = "error"

    @property
    def foreground(self) -> tuple[str, ...]:
        """The classes without the background."""
        return self.classes[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The network: `filters` at full resolution, `depth` halvings."""

    name: Annotated[str, Choice(MODEL_NAMES)] = "unet"
    filters: Annotated[int, Integer(1, 256)] = 16
    depth: Annotated[int, Integer(1, 6)] = 4
    head: Literal["softmax", "sigmoid"] = "softmax"
    normalization: Literal["weight", "group", "none"] = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image becomes patches; `patch` is in voxels, ordered (z,) y, x, each a multiple of 2**depth.

    `spacing` is what images are resampled to, ordered (z,) y, x, in the images' unit; None leaves them as they are.
    `window` is the range of values that "window" maps to 0 to 1, such as Hounsfield units. `crop` "foreground" leaves
    out the border where nothing is.
    """

    spacing: Annotated[
        tuple[float, ...] | None,
        ListOf(Number(above=0, maximum=1e6), "distances between voxels, ordered (z,) y, x", at_least=2, at_most=3),
    ] = None
    label_interpolation: Literal["nearest", "linear"] = "nearest"
    intensity: Literal["zscore", "foreground_zscore", "percentile", "window", "none"] = "zscore"
    window: Annotated[
        tuple[float, ...] | None,
        ListOf(Number(minimum=-1e6, maximum=1e6), "values, the lowest and the highest", at_least=2, at_most=2),
    ] = None
    crop: Literal["none", "foreground"] = "none"
    patch: Annotated[tuple[int, ...], _SIZES]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptimizer:
    """Takes a site's local steps. "cosine" lowers the rate over the rounds to zero, after `warmup_rounds` of rise."""

    name: Literal["sgd", "momentum", "adam"]
    learning_rate: Annotated[float, Number(above=0)]
    momentum: Annotated[float, Number(minimum=0, below=1), When("name", ("momentum",), 0.9)]
    beta_1: Annotated[float, Number(minimum=0, below=1), When("name", ("adam",), 0.9)]
    beta_2: Annotated[float, Number(minimum=0, below=1), When("name", ("adam",), 0.999)]
    epsilon: Annotated[float, Number(above=0), When("name", ("adam",), 1e-7)]
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_rounds: Annotated[int, Integer(0, 10_000)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizer:
    """Applies a round's mean update to the global model; "sgd" at rate 1 is plain averaging."""

    name: Literal["sgd", "momentum", "adam", "yogi"]
    learning_rate: Annotated[float, Number(above=0)]
    momentum: Annotated[float, Number(minimum=0, below=1), When("name", ("momentum",), 0.9)]
    beta_1: Annotated[float, Number(minimum=0, below=1), When("name", ("adam", "yogi"), 0.9)]
    beta_2: Annotated[float, Number(minimum=0, below=1), When("name", ("adam", "yogi"), 0.99)]
    epsilon: Annotated[float, Number(above=0), When("name", ("adam", "yogi"), 1e-3)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the rounds run.

    `patches_per_epoch` None means one patch a case. `clip_norm` bounds the global gradient norm at the client.
    `foreground_fraction` is the share of patches centred on foreground. `threads` (intra-op) is part of a study
    because it decides the bits of the result. `modality_dropout` is the chance that a patch loses a modality, never
    the last.
    """

    algorithm: Literal["fedavg", "fedprox"] = "fedavg"
    proximal_mu: Annotated[float, Number(above=0), When("algorithm", ("fedprox",), 0.01)]
    rounds: Annotated[int, Integer(1, 10_000)]
    local_epochs: Annotated[int, Integer(1)] = 1
    patches_per_epoch: Annotated[int | None, Integer(1)] = None
    batch_size: Annotated[int, Integer(1)] = 8
    weighting: Literal["examples", "equal"] = "examples"
    client_optimizer: Annotated[ClientOptimizer, Absent({"name": "adam", "learning_rate": 1e-3})]
    server_optimizer: Annotated[ServerOptimizer, Absent({"name": "sgd", "learning_rate": 1.0})]
    clip_norm: Annotated[float | None, Number(above=0)] = None
    foreground_fraction: Annotated[float, Number(minimum=0, maximum=1)] = 0.33
    modality_dropout: Annotated[float, Number(minimum=0, below=1)] = 0.0
    threads: Annotated[int, Integer(1, 64)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Who takes part. `sites` is sorted, as updates are summed in that order. The deadline is a study's only timing.

    Cases with errors are kept out as long as `minimum_cases` sound ones remain; None lets no site with any take part.
    """

    sites: Annotated[tuple[str, ...], ListOf(_SITE_NAME, "site names", at_least=1, at_most=50, order=str)]
    quorum: Annotated[int, Integer(1), Derived()]
    deadline_seconds: Annotated[float, Duration(), Key("deadline")] = 3600.0
    minimum_cases: Annotated[int | None, Integer(1)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """`validation_fraction` 0: sites do not evaluate. `overlap` is that of sliding-window tiles."""

    validation_fraction: Annotated[float, Number(minimum=0, below=1)] = 0.2
    overlap: Annotated[float, Number(minimum=0, maximum=0.9)] = 0.25
    holdout: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishing:
    """What is published; `tile` is the input size of the published models, in voxels, ordered (z,) y, x."""

    variants: Annotated[
        tuple[str, ...], ListOf(Choice(VARIANTS), "variants", at_least=1, at_most=len(VARIANTS), order=VARIANTS.index)
    ] = VARIANTS
    tile: Annotated[tuple[int, ...], _SIZES, Derived()]
    calibration_images: Annotated[int, Integer(1, 1000)] = 32
    allowed_dice_loss: Annotated[float, Number(minimum=0, maximum=1)] = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A whole study file, every default resolved."""

    name: Annotated[str, _STUDY_NAME, Key("study")]
    seed: Annotated[int, Integer(0, _SEED_LIMIT)] = 0
    task: Task
    model: Annotated[Model, Absent()]
    preprocessing: Preprocessing
    augmentation: Annotated[
        tuple[str, ...], ListOf(Choice(AUGMENTATIONS), "augmentations", order=AUGMENTATIONS.index)
    ] = ("flip", "rotate", "scale", "gamma", "contrast", "noise")
    training: Training
    cohort: Cohort
    evaluation: Annotated[Evaluation, Absent()]
    publishing: Annotated[Publishing, Absent()]

    def canonical(self) -> str:
        """Canonical JSON, every default resolved: files that mean the same give the same text."""
        return json.dumps(_tree(self, printed=False), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_yaml(self) -> str:
        """The study as resolved; `parse_study` of it gives an equal study."""
        return yaml.dump(_tree(self, printed=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def load_study(path: Path) -> Study:
    """Reads a study file (UTF-8). Raises StudyError, which names the file as `path` does."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"study file: cannot be read: {error.strerror or error}; give a YAML file ({path})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError(
            f"study file: expected UTF-8 text, found other bytes; save it as UTF-8 ({path}:{line})"
        ) from error
    return parse_study(text, source=str(path))


def parse_study(text: str, source: str = "study") -> Study:
    """Parses a study; `source` is what errors call the file. Raises StudyError with a line for each problem."""
    root = _compose(text, source)
    found = _Found(source)
    _read_section(Study, "", root, found)
    for relation in _RELATIONS:
        relation(found)
    if found.problems:
        raise StudyError("\n".join(message for _, message in sorted(found.problems, key=lambda problem: problem[0])))
    study = _build(Study, "", found.values)
    assert isinstance(study, Study)
    return study


# Relations: rules that span keys. ----------------------------------------------------------------------------------


class _Found:
    """What was read so far: values and nodes by their path ("training.rounds"), and the problems by line."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.nodes: dict[str, Node] = {}
        self.problems: list[tuple[int, str]] = []

    def problem(self, line: int, path: str, message: str) -> None:
        self.problems.append((line, f"{path}: {message} ({self.source}:{line})"))

    def refuse(self, path: str, node: Node, expected: str, found: str | None = None) -> None:
        self.problem(_line(node), path, f"expected {expected}, found {found or _shown(node)}")

    def known(self, *paths: str) -> list[Any] | None:
        """The values at `paths`, or None if one of them was refused or is absent."""
        return [self.values[path] for path in paths] if all(path in self.values for path in paths) else None


def _classes_fit_labels(found: _Found) -> None:
    if (known := found.known("task.classes")) and known[0][0] != "background":
        found.refuse("task.classes", found.nodes["task.classes"], '"background" as the first class')
    if (known := found.known("task.classes", "task.labels")) and known[1] == "instances" and len(known[0]) != 2:
        expected = "exactly 2 classes, background and one foreground, with labels: instances"
        found.refuse("task.classes", found.nodes["task.classes"], expected)


def _sizes_fit_the_model(found: _Found) -> None:
    if patch := found.known("preprocessing.patch"):
        found.values.setdefault("publishing.tile", patch[0])
    for path in ("preprocessing.patch", "publishing.tile"):
        known = found.known(path, "task.dimensions", "model.depth")
        if known is None or path not in found.nodes:  # a tile that was filled in is reported as the patch it is
            continue
        sizes, dimensions, depth = known
        if len(sizes) != dimensions or any(size % 2**depth for size in sizes):
            axes = "y, x" if dimensions == 2 else "z, y, x"
            expected = f"{dimensions} sizes ({axes}), each a multiple of {2**depth} (2 to the power of model.depth)"
            found.refuse(path, found.nodes[path], expected)


def _channels_fit_modalities(found: _Found) -> None:
    if (known := found.known("task.channels", "task.modalities")) and known[1] and known[0] != len(known[1]):
        expected = f"{len(known[1])}, one channel for each of task.modalities"
        found.refuse("task.channels", found.nodes["task.channels"], expected)
    if (known := found.known("training.modality_dropout", "task.modalities")) and known[0] and len(known[1]) < 2:
        expected = "0 where task.modalities names fewer than two"
        found.refuse("training.modality_dropout", found.nodes["training.modality_dropout"], expected)


def _spacing_fits_dimensions(found: _Found) -> None:
    path = "preprocessing.spacing"
    known = found.known(path, "task.dimensions")
    if known and known[0] is not None and len(known[0]) != known[1]:
        axes = "y, x" if known[1] == 2 else "z, y, x"
        found.refuse(path, found.nodes[path], f"{known[1]} distances ({axes}), or null")


def _window_fits_intensity(found: _Found) -> None:
    known = found.known("preprocessing.window", "preprocessing.intensity")
    if known is None:
        return
    window, intensity = known
    if (window is None) is (intensity == "window"):
        path = "preprocessing.window" if window is not None else "preprocessing.intensity"
        expected = "a window of two values with intensity: window, and with no other"
        found.refuse(path, found.nodes[path], expected)
    elif window is not None and window[0] >= window[1]:
        found.refuse("preprocessing.window", found.nodes["preprocessing.window"], "the lower value first")


def _quorum_fits_sites(found: _Found) -> None:
    if known := found.known("cohort.sites"):
        sites = len(known[0])
        if found.values.setdefault("cohort.quorum", sites) > sites:
            expected = f"at most {sites}, the number of sites"
            found.refuse("cohort.quorum", found.nodes["cohort.quorum"], expected)


def _warmup_fits_rounds(found: _Found) -> None:
    path = "training.client_optimizer.warmup_rounds"
    if (known := found.known(path, "training.rounds")) and known[0] >= known[1]:
        found.refuse(path, found.nodes[path], f"fewer than the {known[1]} of training.rounds")


def _float32_is_published(found: _Found) -> None:
    path = "publishing.variants"
    if (known := found.known(path)) and "float32" not in known[0]:
        found.refuse(path, found.nodes[path], "float32 among the variants (the others are measured against it)")


_RELATIONS: tuple[Callable[[_Found], None], ...] = (
    _classes_fit_labels,
    _sizes_fit_the_model,
    _channels_fit_modalities,
    _spacing_fits_dimensions,
    _window_fits_intensity,
    _quorum_fits_sites,
    _warmup_fits_rounds,
    _float32_is_published,
)

# The reader. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Field:
    """One key of a section, as its dataclass field declares it."""

    name: str
    key: str
    rule: _Rule | None
    section: type | None
    default: Any
    when: When | None
    absent: Absent | None
    derived: bool


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
        )
    return result


_Note = TypeVar("_Note")


def _note(notes: list[Any], kind: type[_Note]) -> _Note | None:
    return next((note for note in notes if isinstance(note, kind)), None)


def _paths(section: type = Study, prefix: str = "") -> Iterator[str]:
    for key, known in _fields_of(section).items():
        yield prefix + key
        if known.section:
            yield from _paths(known.section, f"{prefix}{key}.")


def _read_section(section: type, path: str, node: Node, found: _Found, line: int = 1) -> None:
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
    node: Node, known: dict[str, _Field], path: str, prefix: str, found: _Found
) -> dict[str, tuple[Node, Node]] | None:
    """The known keys of a section with their nodes; unknown and repeated ones become problems."""
    if not isinstance(node, MappingNode):
        found.refuse(path or "study file", node, f"keys and values ({', '.join(known)})")
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
            elsewhere = [other for other in _paths() if other.rpartition(".")[2] == key]
            guess = f"; did you mean {(near or elsewhere)[0]}?" if near or elsewhere else "."
            message = f"unknown key{guess} Known here: {', '.join(known)}"
            found.problem(_line(key_node), prefix + _shown(key_node), message)
    return given


def _read_key(declared: _Field, path: str, given: tuple[Node, Node] | None, found: _Found, line: int) -> None:
    if given is not None:
        key_node, node = given
        found.nodes[path] = node
        if declared.section is not None:
            if declared.absent is not None and _is_null(node):  # a section whose keys are all commented out
                node = _mapping(declared.absent.keys)
            _read_section(declared.section, path, node, found, _line(key_node))
        elif declared.rule is not None:
            if declared.default is None and _is_null(node):
                found.values[path] = None
                return
            try:
                found.values[path] = declared.rule.read(node)
            except _Refused as refused:
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
    declared: _Field, when: When, prefix: str, path: str, given: tuple[Node, Node] | None, found: _Found
) -> None:
    chosen = found.values.get(prefix + when.selector)
    if chosen in when.values:
        if given is None:
            found.values[path] = when.default
    elif chosen is not None:
        if given is not None:
            owners = " or ".join(when.values)
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


_Dumper.add_representer(_Flow, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def _compose(text: str, source: str) -> Node:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character {chr(error.character)!r} is not allowed"
    except (ValueError, OverflowError, RecursionError) as error:
        line = loader.line + 1 if loader else 1
        what = (
            "nested too deeply" if isinstance(error, RecursionError) else 'an escape such as "\\U" names no character'
        )
    else:
        if node is not None:
            return node
        raise StudyError(
            f"study file: expected keys and values ({', '.join(_fields_of(Study))}), found none ({source}:1)"
        )
    raise StudyError(f"study file: not readable as YAML: {what} ({source}:{line})")


def _mapping(keys: Mapping[str, str | float]) -> Node:
    node = yaml.compose(yaml.safe_dump(dict(keys)), Loader=yaml.SafeLoader)
    assert node is not None
    return node


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _shown(node: Node) -> str:
    """A node as the file has it, short enough for a message."""
    if _is_null(node):
        return "nothing"
    if isinstance(node, SequenceNode) and all(isinstance(item, ScalarNode) for item in node.value):
        text = f"[{', '.join(_shown(item) for item in node.value)}]"
    elif isinstance(node, ScalarNode):
        text = str(node.value)
        if not text.isprintable() or not text:
            text = repr(text)
        elif node.style in ("'", '"'):
            text = f'"{text}"'
    else:
        return "a list" if isinstance(node, SequenceNode) else "keys and values"
    return text if len(text) <= 80 else text[:77] + "..."
