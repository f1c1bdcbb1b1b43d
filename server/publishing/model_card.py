"""The model card: what a person should know before using a published version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.export.figures import json_ready
from common.privacy.report import privacy_words
from common.study import Study
from server.continual import card_section
from server.evaluation import LARGE_SITE_CASES
from server.publishing.variant import Variant, works_alone

if TYPE_CHECKING:
    from common.models.network import Network


def model_card(
    study: Study,
    network: Network,
    variants: Sequence[Variant],
    report: Mapping[str, Any],
    details: Mapping[str, object],
) -> str:
    """Markdown. `report` and `details` are as of `server.publishing.publish`."""
    task, training = study.task, study.training
    tile = " x ".join(map(str, study.publishing.tile))
    axes = "y, x" if task.dimensions == 2 else "z, y, x"
    stated = [
        f"- {key.replace('_', ' ')}: {_shown(value)}"
        for key, value in details.items()
        if json_ready(value) is not None and not isinstance(value, Mapping)
    ]
    failed = [v for v in variants if v.failure]
    parts = [
        f"# {study.name}, version {report['version']}",
        "## Intended use",
        f"Segmentation of {', '.join(task.foreground)} in {task.dimensions}D images of {task.channels} "
        f"{'channel' if task.channels == 1 else 'channels'}, for research. It is no medical device: nobody has shown "
        "that it is safe to diagnose or treat with. Check its results on images of your own before you rely on them.",
        f"Input: one tile of {tile} voxels ({axes}), prepared as `intensity: {study.preprocessing.intensity}` in "
        f"`study.yaml`. Output: {', '.join(outputs_of(study))} ({study.model.head}), from 0 to 1. Larger images are "
        f"cut into tiles that overlap by {study.evaluation.overlap:.0%}.",
        "## Data",
        f"Trained on the images of {len(study.cohort.sites)} sites: {', '.join(study.cohort.sites)}. The images stayed "
        "at their sites; updates of the model's weights were combined."
        + (f" Measured on {_holdout_words(variants[0])}." if variants[0].result else ""),
        "## Training",
        f"A {task.dimensions}D {study.model.name} of {network.parameters:,} weights ({study.model.filters} filters, "
        f"depth {study.model.depth}, normalization: {study.model.normalization}), trained by {training.algorithm} in "
        f"a study of {training.rounds} {'round' if training.rounds == 1 else 'rounds'} with "
        f"{training.client_optimizer.name} at the sites. `study.yaml` has every setting.",
        "\n".join(stated),
        *card_section(details),
        *_privacy(study, details.get("privacy")),
        "## Files",
        _files_table(report["variants"]),
        "Dice is the mean over the holdout's images, 1 is perfect; lost is against float32. The time is the median of "
        "a tile on one thread of the machine that published, so compare only the ratios. "
        + (
            f"Recommended are files that lose at most {study.publishing.allowed_dice_loss:g} Dice."
            if works_alone(study)
            else "None is recommended, because this model needs a site's own normalization first."
        ),
        "\n".join(f"- {v['name']}: {v['note']}." for v in report["variants"] if v["note"]),
        _explanation(report.get("explanation")),
        *(["## Holdout Dice", _site_table(variants)] if variants[0].result else []),
        "## Limits",
        _limits(study, variants, report, bool(failed)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _files_table(figures: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| file | MB | size | Dice | lost | ms | time | recommended |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for entry in figures:
        if entry["failed"]:
            lines.append(f"| ({entry['name']}: none) | - | - | - | - | - | - | no |")
            continue
        lines.append(
            f"| {entry['file']} | {entry['bytes'] / 1e6:.2f} | {entry['ratio_to_float32']:.2f}x | "
            f"{_number(entry['dice'])} | {_number(entry['dice_lost'])} | {entry['latency_ms']:.1f} | "
            f"{entry['latency_ratio']:.2f}x | {'yes' if entry['recommended'] else 'no'} |"
        )
    return "\n".join(lines)


def _privacy(study: Study, report: object) -> list[str]:
    """What is said of differential privacy, where there is any."""
    if not isinstance(report, Mapping):
        return []
    lines = [
        f"Differential privacy. The unit that is protected is {report['protects']}: {privacy_words(report)} (Gaussian "
        f"noise of {report['noise_multiplier']:g} times the clipping norm {report['clip_norm']:g}; Rényi accounting, "
        "neighbours by adding or removing one unit)."
    ]
    if sites := report.get("sites"):
        lines.append("Where a site knows nothing of patients, each of its images counts as one.")
        lines.append("Each site's patients are protected by the epsilon of that site:")
        rows = [f"| {site} | {value:.3f} |" for site, value in sites.items()]
        lines.append("\n".join(["| site | epsilon |", "|---|---:|", *rows]))
    if study.evaluation.validation_fraction > 0:
        lines.append(
            "Validation is not covered: the sites' Dice on their validation images has no noise, and chose the round."
        )
    return ["## Privacy", *lines]


def _explanation(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    if figures["failed"]:
        return f"There is no file for explanations: {figures['note']}."
    return (
        f"`{figures['file']}` ({figures['bytes'] / 1e6:.2f} MB, float32) says where the model saw what it predicts: "
        "beside the probabilities it computes a Grad-CAM map of every foreground class. It is for `predict --explain`."
    )


def _site_table(variants: Sequence[Variant]) -> str:
    """A row a site, then a class where there are several; a column a variant."""
    measured = [(variant.name, variant.result) for variant in variants if variant.result is not None]
    first = measured[0][1]
    rows: list[tuple[str, str, list[float]]] = []
    for site, count in first.cases_of_sites.items():
        rows.append((f"site {site}", str(count), [result.dice_of_sites[site] for _, result in measured]))
    if first.cases_of_sites:
        rows.append(("mean of sites", "", [result.mean_dice_of_sites for _, result in measured]))
    if any(count >= LARGE_SITE_CASES for count in first.cases_of_sites.values()):
        title = f"mean of sites with {LARGE_SITE_CASES} images or more"
        rows.append((title, "", [result.mean_dice_of_large_sites for _, result in measured]))
    if first.cases_of_sites and None in first.sites:
        count = first.sites.count(None)
        rows.append(("of no site of the study", str(count), [result.dice_of_others for _, result in measured]))
    if len(first.classes) > 1:
        for name in first.classes:
            rows.append((f"class {name}", "", [result.dice_of_classes[name] for _, result in measured]))
    rows.append(("all images", str(len(first.cases)), [result.mean_dice for _, result in measured]))
    lines = [
        f"| | images | {' | '.join(name for name, _ in measured)} |",
        "|---|---:|" + "---:|" * len(measured),
    ]
    lines += [f"| {title} | {count} | {' | '.join(map(_number, values))} |" for title, count, values in rows]
    return "\n".join(lines)


def _limits(study: Study, variants: Sequence[Variant], report: Mapping[str, Any], has_failed: bool) -> str:
    alone = (
        "The sites kept their normalization layers to themselves (training.personal: normalization), so those in these "
        "files are as they began, and the figures above are of the model without them. Do not use it as it is: "
        "`wardround-site personalize` finds the layers on a site's own labelled images."
    )
    limits = [
        *([] if works_alone(study) else [alone]),
        "Images of another kind than the training sites' (other devices, stains, body parts, age groups) may be "
        "segmented badly, without any warning.",
        "Overlap says how much of the area agrees; it does not say how many objects were found or missed.",
    ]
    result = variants[0].result
    if result is None:
        limits.append("There was no holdout, so nobody has measured these files.")
    else:
        small = [site for site, count in result.cases_of_sites.items() if count < LARGE_SITE_CASES]
        if small:
            limits.append(
                f"Sites with fewer than {LARGE_SITE_CASES} holdout images say little about their kind: "
                f"{', '.join(small)}."
            )
    if report["calibration"]:
        limits.append(
            f"int8 was calibrated on {len(report['calibration'])} of the holdout's images, without their labels; its "
            "figures may be slightly too good."
        )
    if has_failed:
        limits.append("Variants marked as none could not be made; the reasons are given under Files.")
    return "\n".join(f"- {limit}" for limit in limits)


def outputs_of(study: Study) -> tuple[str, ...]:
    """What the channels of a published file's output are."""
    if study.model.head == "distance":
        return "foreground", "distance"
    return study.task.classes if study.model.head == "softmax" else study.task.foreground


def _holdout_words(variant: Variant) -> str:
    count = len(variant.result.cases) if variant.result else 0
    return f"{count} holdout {'image' if count == 1 else 'images'} of the coordinator's own"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no -0.0000


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
