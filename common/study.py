"""The study file: YAML, parsed once into frozen dataclasses. Everything that decides a result is in here.

The dataclasses below are the format: a field is a key, its type and annotations are the rules (`common.study_rules`),
and its default is what an absent key means. `common.study_relations` holds the rules that span several keys.
Whatever is wrong with a file is reported at once, a line for each problem, in one `StudyError` (`common.study_reader`):

    >>> parse_study(text.replace("rounds: 24", "rounds: -3"), source="studies/nuclei.yaml")
    StudyError: training.rounds: expected a positive integer, found -3 (studies/nuclei.yaml:12)

YAML is read strictly: only plain decimal numbers are numbers (`1e-3` is one, `1:30` and `0x10` are not), `no` and `on`
are never names, and keys given twice, anchors, aliases, tags and merge keys are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common import study_reader
from common.errors import StudyError
from common.network_traits import NETWORKS
from common.study_relations import RELATIONS
from common.study_rules import (
    Absent,
    Choice,
    Derived,
    Duration,
    Integer,
    Key,
    Later,
    ListOf,
    Number,
    Text,
    When,
)

ENCODERS = ("mobilenetv3", "xception")
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
"""Every variation of training patches. The place in this list is the variation's part of the seed: new ones go to its
end (`common.imaging.augmentation`)."""
VARIANTS = ("float32", "float16", "dynamic_range", "int8", "onnx")
DEFAULT_VARIANTS = VARIANTS[:4]
HOLDOUT = "holdout"

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
_PATH = Text(r"\S(.{0,4094}\S)?", "a path")
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
    classes: Annotated[tuple[str, ...], ListOf(_CLASS_NAME, "class names, background first", at_least=2, at_most=255)]
    labels: Literal["classes", "instances"] = "classes"
    modalities: Annotated[tuple[str, ...], ListOf(_MODALITY, "modalities", at_most=16)] = ()
    missing_modality: Literal["error", "zero"] = "error"

    @property
    def foreground(self) -> tuple[str, ...]:
        """The classes without the background."""
        return self.classes[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The network: `filters` at full resolution, `depth` halvings (`common.models`).

    The head "distance" tells touching objects apart: it answers where the foreground is and how far inside its object
    each voxel lies. `encoder` is that of deeplabv3plus. `encoder_weights` is a file that the coordinator starts the
    encoder from; sites never open it.
    """

    name: Annotated[str, Choice(tuple(NETWORKS))] = "unet"
    filters: Annotated[int, Integer(1, 256)] = 16
    depth: Annotated[int, Integer(1, 6)] = 4
    head: Literal["softmax", "sigmoid", "distance"] = "softmax"
    normalization: Literal["weight", "group", "batch", "none"] = "weight"
    encoder: Annotated[str | None, Choice(ENCODERS), Later()] = None
    encoder_weights: Annotated[str | None, _PATH, Later()] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image becomes patches; `patch` is in voxels, ordered (z,) y, x, each a multiple of the network's stride.

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
    the last. `precision` "auto" lets a site compute convolutions in bfloat16 where its processor is faster so.
    `start_from` is the folder of a published version that the coordinator starts from; sites never open it. With
    `personal` "normalization" the normalization layers of a site stay its own (FedBN, Li et al. 2021,
    arXiv:2102.07623).
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
    precision: Annotated[Literal["float32", "auto"], Later()] = "float32"
    start_from: Annotated[str | None, _PATH, Later()] = None
    personal: Annotated[Literal["none", "normalization"], Later()] = "none"


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
    """Which of a site's cases validate, and how. `overlap` is that of sliding-window tiles.

    `mirror` averages the answers to an image and its mirror images. `surface_tolerance` is how far apart surfaces still
    count as one, in mm, in microscopy um.

    `validation_fraction` is the share of a site's cases that validates; 0: sites do not evaluate. With `folds` the
    cases are divided by patient into so many parts instead, and part `fold`, counted from 0, validates.
    """

    validation_fraction: Annotated[float, Number(minimum=0, below=1), When("folds", (None,), 0.2)]
    folds: Annotated[int | None, Integer(2, 20), Later()] = None
    fold: Annotated[int, Integer(0, 19), Later()] = 0
    overlap: Annotated[float, Number(minimum=0, maximum=0.9)] = 0.25
    holdout: bool = True
    mirror: Annotated[bool, Later()] = False
    surface_tolerance: Annotated[float, Number(above=0), Later()] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishing:
    """What is published; `tile` is the input size of the published models, in voxels, ordered (z,) y, x.

    With `explain` one more file beside the variants says where in an image the model saw what it predicts.
    """

    variants: Annotated[
        tuple[str, ...], ListOf(Choice(VARIANTS), "variants", at_least=1, at_most=len(VARIANTS), order=VARIANTS.index)
    ] = DEFAULT_VARIANTS
    tile: Annotated[tuple[int, ...], _SIZES, Derived()]
    calibration_images: Annotated[int, Integer(1, 1000)] = 32
    allowed_dice_loss: Annotated[float, Number(minimum=0, maximum=1)] = 0.01
    explain: Annotated[bool, Later()] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """Differential privacy: whose data the noise hides, how much of it there is, and the budget that ends the study.

    `unit` "patient": each site trains by DP-SGD, so that its updates hide each of its patients. "site": the coordinator
    clips each site's update and adds noise to their sum, so that the model hides each site. `epsilon` at `delta` is the
    budget: no round begins that would pass it. Noise has the standard deviation `noise_multiplier` * `clip_norm`.

    With "patient" a round is `steps_per_round` steps. In each, every patient takes part by chance, `patients_per_step`
    are expected, and gives the gradient of `crops_per_patient` patches, clipped to the norm `clip_norm`. With "site"
    `clip_norm` is that of a site's update.
    """

    unit: Literal["none", "patient", "site"] = "none"
    epsilon: Annotated[float, Number(above=0, maximum=1000), When("unit", ("patient", "site"), 0.0)]
    delta: Annotated[float, Number(above=0, maximum=0.1), When("unit", ("patient", "site"), 1e-5)]
    noise_multiplier: Annotated[float, Number(above=0, maximum=1000), When("unit", ("patient", "site"), 1.0)]
    clip_norm: Annotated[float, Number(above=0, maximum=1e6), When("unit", ("patient", "site"), 1.0)]
    patients_per_step: Annotated[float, Number(minimum=1, maximum=1e6), When("unit", ("patient",), 8.0)]
    steps_per_round: Annotated[int, Integer(1, 10_000), When("unit", ("patient",), 10)]
    crops_per_patient: Annotated[int, Integer(1, 1000), When("unit", ("patient",), 1)]


NO_PRIVACY = Privacy(
    unit="none",
    epsilon=0.0,
    delta=0.0,
    noise_multiplier=0.0,
    clip_norm=0.0,
    patients_per_step=0.0,
    steps_per_round=0,
    crops_per_patient=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureAggregation:
    """Whether the coordinator sees sums alone, and what they ask for (`common.secure_aggregation`).

    `protocol` "bonawitz": no update, weight, metric or count of one site leaves it but masked. A round needs
    `threshold` sites to unmask, and sums the updates of `minimum_cohort` sites or more.

    Sums are of whole numbers. Values of an update beyond plus or minus `largest_update` are clipped to it, and what is
    within is rounded to as many steps as leave the sums 32 bits. A site with more patches a round than `largest_weight`
    counts as one with so many.
    """

    protocol: Literal["none", "bonawitz"] = "none"
    threshold: Annotated[int, Integer(2, 50), When("protocol", ("bonawitz",), 0)]
    minimum_cohort: Annotated[int, Integer(3, 50), When("protocol", ("bonawitz",), 0)]
    largest_update: Annotated[float, Number(above=0, maximum=1e6), When("protocol", ("bonawitz",), 1.0)]
    largest_weight: Annotated[int, Integer(1, 10_000_000), When("protocol", ("bonawitz",), 10_000)]

    @property
    def required(self) -> bool:
        """Whether the study's sums are secure."""
        return self.protocol != "none"


NO_SECURE_AGGREGATION = SecureAggregation(
    protocol="none", threshold=0, minimum_cohort=0, largest_update=0.0, largest_weight=0
)


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
    privacy: Annotated[Privacy, Absent(), Later()] = NO_PRIVACY
    secure_aggregation: Annotated[SecureAggregation, Absent(), Later()] = NO_SECURE_AGGREGATION

    def canonical(self) -> str:
        """Canonical JSON, every default resolved: files that mean the same give the same text."""
        return study_reader.canonical(self)

    def to_yaml(self) -> str:
        """The study as resolved; `parse_study` of it gives an equal study."""
        return study_reader.to_yaml(self)


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
    return study_reader.read(Study, text, source, RELATIONS)
