"""The rules of a study file that span several keys, each a function that reads and refuses what it finds.

`Found` holds the values by their path; a rule says nothing of a key that is wrong by itself, and may fill in what
follows from other keys. `RELATIONS` are run in order, once every key was read.
"""

from __future__ import annotations

from collections.abc import Callable

from common.network_traits import NETWORKS
from common.secure_aggregation.session import MIN_SITES, default_threshold
from common.study_reader import Found
from common.wording import counted

_WITH_ENCODER = ("deeplabv3plus", "mobilenetv3_small")


def _classes_fit_labels(found: Found) -> None:
    if (known := found.known("task.classes")) and known[0][0] != "background":
        found.refuse("task.classes", found.nodes["task.classes"], '"background" as the first class')
    if (known := found.known("task.classes", "task.labels")) and known[1] == "instances" and len(known[0]) != 2:
        expected = "exactly 2 classes, background and one foreground, with labels: instances"
        found.refuse("task.classes", found.nodes["task.classes"], expected)


def _sizes_fit_the_model(found: Found) -> None:
    if patch := found.known("preprocessing.patch"):
        found.values.setdefault("publishing.tile", patch[0])
    for path in ("preprocessing.patch", "publishing.tile"):
        known = found.known(path, "task.dimensions", "model.name", "model.depth")
        if known is None or path not in found.nodes:  # a tile that was filled in is reported as the patch it is
            continue
        sizes, dimensions, name, depth = known
        stride = NETWORKS[name].stride(depth)
        if len(sizes) != dimensions or any(size % stride for size in sizes):
            axes = "y, x" if dimensions == 2 else "z, y, x"
            why = f"that {name} asks for" if NETWORKS[name].fixed_stride else "2 to the power of model.depth"
            expected = f"{dimensions} sizes ({axes}), each a multiple of {stride} ({why})"
            found.refuse(path, found.nodes[path], expected)


def _keys_fit_the_model(found: Found) -> None:
    path = "model.name"
    if (known := found.known(path, "task.dimensions")) and known[1] not in (taken := NETWORKS[known[0]].dimensions):
        found.refuse(path, found.nodes[path], f"a network for {known[1]}D images ({known[0]} takes {taken[0]}D)")
    path = "model.depth"
    if (known := found.known("model.name", path)) and known[1] > NETWORKS[known[0]].deepest:
        if path in found.nodes:
            found.refuse(path, found.nodes[path], f"at most {NETWORKS[known[0]].deepest} with name: {known[0]}")
        else:
            found.values[path] = NETWORKS[known[0]].deepest
    path = "model.encoder"
    if known := found.known("model.name", path):
        name, encoder = known
        if NETWORKS[name].encoders:
            found.values[path] = encoder or NETWORKS[name].encoders[0]
        elif encoder is not None:
            found.refuse(path, found.nodes[path], f"no encoder with name: {name} (it belongs to deeplabv3plus)")
    path = "model.encoder_weights"
    if (known := found.known("model.name", path)) and known[1] is not None and known[0] not in _WITH_ENCODER:
        owners = " or ".join(_WITH_ENCODER)
        found.refuse(path, found.nodes[path], f"no file with name: {known[0]} (it belongs to {owners})")
    path = "model.head"
    if (known := found.known(path, "task.labels")) and known[0] == "distance" and known[1] != "instances":
        found.refuse(path, found.nodes[path], "softmax or sigmoid where task.labels is classes")
    path = "training.personal"
    if (known := found.known(path, "model.normalization")) and known[0] != "none" and known[1] != "batch":
        found.refuse(path, found.nodes[path], "none unless model.normalization is batch")


def _mirror_fits_augmentation(found: Found) -> None:
    path = "evaluation.mirror"
    if (known := found.known(path, "augmentation")) and known[0] and "flip" not in known[1]:
        expected = "false where augmentation has no flip: the model never sees mirror images"
        found.refuse(path, found.nodes[path], expected)


def _channels_fit_modalities(found: Found) -> None:
    if (known := found.known("task.channels", "task.modalities")) and known[1] and known[0] != len(known[1]):
        expected = f"{len(known[1])}, one channel for each of task.modalities"
        found.refuse("task.channels", found.nodes["task.channels"], expected)
    if (known := found.known("training.modality_dropout", "task.modalities")) and known[0] and len(known[1]) < 2:
        expected = "0 where task.modalities names fewer than two"
        found.refuse("training.modality_dropout", found.nodes["training.modality_dropout"], expected)


def _spacing_fits_dimensions(found: Found) -> None:
    path = "preprocessing.spacing"
    known = found.known(path, "task.dimensions")
    if known and known[0] is not None and len(known[0]) != known[1]:
        axes = "y, x" if known[1] == 2 else "z, y, x"
        found.refuse(path, found.nodes[path], f"{known[1]} distances ({axes}), or null")


def _window_fits_intensity(found: Found) -> None:
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


def _quorum_fits_sites(found: Found) -> None:
    if known := found.known("cohort.sites"):
        sites = len(known[0])
        if found.values.setdefault("cohort.quorum", sites) > sites:
            expected = f"at most {sites}, the number of sites"
            found.refuse("cohort.quorum", found.nodes["cohort.quorum"], expected)


def _warmup_fits_rounds(found: Found) -> None:
    path = "training.client_optimizer.warmup_rounds"
    if (known := found.known(path, "training.rounds")) and known[0] >= known[1]:
        found.refuse(path, found.nodes[path], f"fewer than the {known[1]} of training.rounds")


def _float32_is_published(found: Found) -> None:
    path = "publishing.variants"
    if (known := found.known(path)) and "float32" not in known[0]:
        found.refuse(path, found.nodes[path], "float32 among the variants (the others are measured against it)")


def _fold_is_one_of_the_folds(found: Found) -> None:
    path = "evaluation.fold"
    if (known := found.known("evaluation.folds", path)) is None:
        return
    folds, fold = known
    if folds is not None:
        found.values["evaluation.validation_fraction"] = 1 / folds
    if fold >= (folds or 1):
        expected = f"0 to {folds - 1}, one of evaluation.folds" if folds else "0 where evaluation.folds is null"
        found.refuse(path, found.nodes[path], expected)


def _privacy_is_whole(found: Found) -> None:
    if (known := found.known("privacy.unit")) is None or known[0] == "none":
        return
    unit = known[0]
    if found.known("privacy.epsilon") == [0.0]:
        found.refuse("privacy.epsilon", found.nodes["privacy.unit"], "a number above 0, the budget", "nothing")
    path = "model.normalization"
    if found.known(path) == ["batch"]:
        expected = f"no batch normalization with privacy.unit: {unit} (its statistics are neither clipped nor noised)"
        found.refuse(path, found.nodes[path], expected)
    path = "training.weighting"
    if path not in found.nodes:
        found.values[path] = "equal"
    elif found.known(path) == ["examples"]:
        expected = f"equal with privacy.unit: {unit} (a weight would tell of the data)"
        found.refuse(path, found.nodes[path], expected)
    if unit != "patient":
        return
    for path, left, instead in (
        ("training.clip_norm", None, "privacy.clip_norm bounds each patient's gradient"),
        ("training.patches_per_epoch", None, "privacy.steps_per_round says how long a round is"),
        ("training.local_epochs", 1, "privacy.steps_per_round says how long a round is"),
    ):
        if path in found.nodes and (known := found.known(path)) and known[0] != left:
            shown = "null" if left is None else left
            found.refuse(path, found.nodes[path], f"{shown} with privacy.unit: patient ({instead})")


def _secure_aggregation_is_possible(found: Found) -> None:
    section = "secure_aggregation"
    known = found.known(f"{section}.protocol", "cohort.sites")
    if known is None or known[0] == "none":
        return
    protocol, sites = known[0], len(known[1])
    if sites < MIN_SITES:
        expected = f"none with {counted(sites, 'site')}: a sum of fewer than {MIN_SITES} updates hides none of them"
        found.refuse(f"{section}.protocol", found.nodes[f"{section}.protocol"], expected)
        return
    path = "model.normalization"
    if found.known(path) == ["batch"]:
        expected = f"no batch normalization with {section}.protocol: {protocol} (its moments have no known range)"
        found.refuse(path, found.nodes[path], expected)
    threshold, cohort = f"{section}.threshold", f"{section}.minimum_cohort"
    if found.values.get(threshold) == 0:
        found.values[threshold] = default_threshold(sites)
    if found.values.get(cohort) == 0 and (given := found.known(threshold)):
        found.values[cohort] = max(MIN_SITES, given[0])
    if (given := found.known(threshold)) and not sites // 2 < given[0] <= sites:
        expected = f"{sites // 2 + 1} to {sites}, more than half of the {sites} sites of cohort.sites and at most all"
        found.refuse(threshold, found.nodes[threshold], expected)
        return
    if (given := found.known(cohort)) and given[0] > sites:
        found.refuse(cohort, found.nodes[cohort], f"at most {sites}, the number of sites")
        return
    quorum = "cohort.quorum"
    if (given := found.known(quorum, threshold, cohort)) and given[0] < max(given[1:]):
        expected = f"{max(given[1:])} or more, {section}'s threshold ({given[1]}) and minimum cohort ({given[2]})"
        found.refuse(quorum, found.nodes[quorum], expected)
    weight, patches, epochs = f"{section}.largest_weight", "training.patches_per_epoch", "training.local_epochs"
    if weight not in found.nodes and (given := found.known(patches, epochs)) and given[0] is not None:
        found.values[weight] = min(given[0] * given[1], 10_000_000)


RELATIONS: tuple[Callable[[Found], None], ...] = (
    _classes_fit_labels,
    _keys_fit_the_model,
    _sizes_fit_the_model,
    _mirror_fits_augmentation,
    _channels_fit_modalities,
    _spacing_fits_dimensions,
    _window_fits_intensity,
    _quorum_fits_sites,
    _warmup_fits_rounds,
    _float32_is_published,
    _fold_is_one_of_the_folds,
    _privacy_is_whole,
    _secure_aggregation_is_possible,
)
