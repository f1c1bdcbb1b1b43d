"""From weights to files: LiteRT models in several precisions, each measured on the holdout, with their papers.

A folder of a published version appears whole or not at all. Every figure in its manifest was measured on exactly the
file that lies beside it, run as a hospital runs it: by LiteRT, a tile at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import PublishError
from common.imaging.patches import pad_to
from common.study import Study
from common.version import VERSION
from server.evaluation import LARGE_SITE_CASES, Holdout, HoldoutResult, predictor

if TYPE_CHECKING:
    from common.models.lite import LiteModel
    from common.models.network import Network

Tile = npt.NDArray[np.float32]

MANIFEST_FORMAT = 1
LARGEST_DIFFERENCE = 1e-3
_LATENCY_RUNS = {2: 15, 3: 5}
_CONVERSIONS_OF_FORMAT = frozenset({"QUANTIZE", "DEQUANTIZE"})
_log = logging.getLogger("wardround.publishing")  # what `wardround coordinator` shows is below "wardround"


@dataclass(frozen=True)
class Variant:
    """One published file and what was measured on it. `failure` says why there is none; the figures are then None."""

    name: str
    failure: str | None = None
    file: str | None = None
    sha256: str | None = None
    size: int | None = None
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    float_operations: Mapping[str, int] | None = None
    operations: int | None = None
    result: HoldoutResult | None = None
    latency: float | None = None


def publish(
    study: Study,
    weights: Sequence[npt.ArrayLike],
    holdout: Holdout | None,
    folder: Path,
    *,
    details: Mapping[str, object],
    progress: Callable[[str], None] = lambda _: None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Convert, check, measure and describe a model; write it all to `folder`, whose name is the version.

    Parameters
    ----------
    study : Study
        `study.publishing` says which variants, for which tile.
    weights : in the order of the network's specs.
    holdout : Holdout or None
        Without one nothing is measured, int8 (which needs images to calibrate on) fails, and only float32 is
        recommended.
    folder : Path
        Must not exist; its parent does.
    details : mapping
        What else to state of these weights, such as the round and its validation Dice. Goes to the manifest, and to the
        card except for figures that do not exist (None, NaN).
    progress : callable
        Takes a sentence on what begins.
    threads : int or None
        Holdout cases in work at once; None: one a core.

    Returns
    -------
    dict
        "version"; "variants": a list, float32 first, of "name", "file", "bytes", "ratio_to_float32" (of bytes, below 1
        is smaller), "dice", "dice_of_large_sites", "dice_lost" (against float32, below 0 is better), "latency_ms"
        (median, a tile on one thread), "latency_ratio" (to float32, below 1 is faster), "recommended", "failed" and
        "note"; "calibration": the names of the holdout images that int8 was calibrated on. What was not measured is
        None.

    Raises
    ------
    PublishError
        The folder exists or cannot be written, or float32 does not convert or does not compute what TensorFlow does.
        Another variant that does not convert or run is reported as failed instead.
    DataError : see `Holdout.load`.
    """
    from common.models import build_network

    if folder.exists():
        raise PublishError(f"{folder}: this version exists already; publish under another version, or move it away")
    network = build_network(study)
    with _appearing_whole(folder) as partial:
        calibration = _calibration(study, holdout) if holdout is not None else []
        names = [name for name, _ in calibration]
        tiles = [tile for _, tile in calibration] or [_noise(study)]
        variants = _converted(study, network, weights, tiles, holdout is not None, partial, progress)
        variants = _timed(variants, partial, tiles[0], _LATENCY_RUNS[study.task.dimensions], progress)
        if holdout is not None:
            variants = _evaluated(study, variants, holdout, partial, threads or _cores(), progress)
        progress("writing the manifest and the model card")
        report = {
            "version": folder.name,
            "variants": [_figures(study, variant, variants[0]) for variant in variants],
            "calibration": names if any(v.name == "int8" and not v.failure for v in variants) else [],
        }
        _write_papers(study, network, variants, report, holdout, details, partial)
    return report


# Converting. -------------------------------------------------------------------------------------------------------


def convert(
    study: Study, network: Network, weights: Sequence[npt.ArrayLike], variant: str, tiles: Sequence[Tile]
) -> bytes:
    """A `.tflite` file of the network with its head: one tile in, its probabilities out, both float32.

    Parameters
    ----------
    variant : of `common.study.VARIANTS`
    tiles : what int8 calibrates its ranges on, (*tile, channel) each; not used for the others.

    Raises
    ------
    PublishError : TensorFlow's converter refuses.
    """
    import tensorflow as tf

    from common.models import probabilities
    from common.models.lite import captured_stderr

    constants = [tf.constant(np.asarray(weight), tf.float32) for weight in weights]
    signature = tf.TensorSpec([1, *study.publishing.tile, network.channels], tf.float32)
    # One image a call: convolutions of an unknown batch are neither folded nor accelerated as well.
    function = tf.function(lambda tile: probabilities(study, network(constants, tile)), autograph=False)
    forward = function.get_concrete_function(signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([forward], tf.Module())
    if variant != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if variant == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if variant == "int8":
        converter.representative_dataset = lambda: ([tile[np.newaxis]] for tile in tiles)
        # float32 is allowed besides, because operations without an int8 kernel (3D convolutions) would be left in
        # float32 or fail, depending on the operation. Which ones were is looked up afterwards.
        converter.target_spec.supported_ops = [
            tf.lite.OpsSet.TFLITE_BUILTINS_INT8,
            tf.lite.OpsSet.TFLITE_BUILTINS,
        ]
    with captured_stderr() as chatter, warnings.catch_warnings(), _silenced("absl"), _silenced("tensorflow"):
        warnings.simplefilter("ignore")
        try:
            model = converter.convert()
        except Exception as error:  # the converter raises what its many parts raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise PublishError(
                f"{variant}: TensorFlow's converter refused the network ({reason}); remove the variant from "
                "publishing.variants, or change the model"
            ) from error
        finally:
            chatter.seek(0)
            said = chatter.read().decode(errors="replace")
    _log.debug("converter, %s:\n%s", variant, said)
    return bytes(model)


def float_operations(model: bytes) -> tuple[Counter[str], int]:
    """The operations of a `.tflite` file that compute in floating point, by name, and the number of all operations.

    Operations that only change the format, QUANTIZE and DEQUANTIZE, are in neither.
    """
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    floating = {schema.TensorType.FLOAT32, schema.TensorType.FLOAT16}
    parsed = schema.Model.GetRootAs(model, 0)
    found: Counter[str] = Counter()
    total = 0
    for graph in (parsed.Subgraphs(index) for index in range(parsed.SubgraphsLength())):
        for operator in (graph.Operators(index) for index in range(graph.OperatorsLength())):
            code = parsed.OperatorCodes(operator.OpcodeIndex())
            # Codes above 127 are in the newer field only.
            name = names.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "CUSTOM")
            if name in _CONVERSIONS_OF_FORMAT:
                continue
            total += 1
            outputs = [graph.Tensors(operator.Outputs(index)) for index in range(operator.OutputsLength())]
            found[name] += any(tensor.Type() in floating for tensor in outputs)
    return +found, total


def _converted(
    study: Study,
    network: Network,
    weights: Sequence[npt.ArrayLike],
    tiles: Sequence[Tile],
    is_calibrated: bool,
    folder: Path,
    progress: Callable[[str], None],
) -> list[Variant]:
    """The variants' files, each run once; a failure is one of that variant, except of float32."""
    from common.models.lite import LiteModel

    expected = predictor(study, network, weights)(tiles[0][np.newaxis])
    variants = []
    for name in study.publishing.variants:
        progress(f"converting to {name}")
        path = folder / f"model_{name}.tflite"
        try:
            if name == "int8" and not is_calibrated:
                raise PublishError("int8: it needs holdout images to calibrate on, and there is no holdout")
            content = convert(study, network, weights, name, tiles)
            path.write_bytes(content)
            model = LiteModel(path)
            _check_answer(name, model(tiles[0][np.newaxis]), expected)
        except PublishError as error:
            if name == "float32":
                raise
            path.unlink(missing_ok=True)
            failure = str(error).removeprefix(f"{name}: ")  # wherever it is shown, the name stands beside it
            _log.warning("variant %s is not published: %s", name, failure)
            variants.append(Variant(name, failure=failure))
            continue
        floats, operations = float_operations(content) if name == "int8" else (None, None)
        variants.append(
            Variant(
                name,
                file=path.name,
                sha256=hashlib.sha256(content).hexdigest(),
                size=len(content),
                input_shape=model.input_shape,
                output_shape=model.output_shape,
                float_operations=floats,
                operations=operations,
            )
        )
    return variants


def _check_answer(name: str, found: Tile, expected: Tile) -> None:
    """float32 must answer what TensorFlow does; the others must answer, and the holdout says how well."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        what = f"shape {found.shape}" if found.shape != expected.shape else "values that are not finite"
        raise PublishError(f"{name}: expected finite answers of shape {expected.shape}, found {what}; do not use it")
    difference = float(np.abs(found - expected).max())
    if name == "float32" and not difference <= LARGEST_DIFFERENCE:
        raise PublishError(
            f"float32: the converted model differs from TensorFlow by {difference:.2g} on one tile, more than "
            f"{LARGEST_DIFFERENCE:g}; the weights may be of another study or not finite: publish another round"
        )


# Calibrating. ------------------------------------------------------------------------------------------------------


def _calibration(study: Study, holdout: Holdout) -> list[tuple[str, Tile]]:
    """Names and one tile each of the images to calibrate on: every site in turn, so that all kinds of image count.

    Labels are not looked at. Which images and where in them follows from the study's seed and the images' names.
    """

    def digest(index: int) -> bytes:
        return hashlib.sha256(f"{study.seed}/calibration/{holdout.cases[index]}".encode()).digest()

    by_site: dict[str | None, list[int]] = {}
    for index in sorted(range(len(holdout)), key=digest):
        by_site.setdefault(holdout.sites[index], []).append(index)
    # (how many of its site came before, site): one of each site, then the next of each.
    turns = sorted((turn, site or "", index) for site, indices in by_site.items() for turn, index in enumerate(indices))
    chosen = [index for _, _, index in turns[: study.publishing.calibration_images]]
    return [
        (holdout.cases[index], _crop(holdout.load(index)[0], study.publishing.tile, digest(index))) for index in chosen
    ]


def _crop(image: Tile, tile: Sequence[int], seed: bytes) -> Tile:
    """A crop of the tile's size, its place drawn from the seed; padded as for inference."""
    rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
    padded = pad_to(image, tile, mode="edge")
    starts = [int(rng.integers(size - length + 1)) for size, length in zip(padded.shape, tile, strict=False)]
    window = tuple(slice(start, start + length) for start, length in zip(starts, tile, strict=True))
    return np.ascontiguousarray(padded[window], dtype=np.float32)


def _noise(study: Study) -> Tile:
    """A tile to compare on where there is no image."""
    shape = (*study.publishing.tile, study.task.channels)
    return np.random.default_rng(study.seed).standard_normal(shape).astype(np.float32)


# Measuring. --------------------------------------------------------------------------------------------------------


def _timed(
    variants: Sequence[Variant], folder: Path, tile: Tile, runs: int, progress: Callable[[str], None]
) -> list[Variant]:
    """With the median seconds of a tile on one thread; the variants take turns, so that other load hits all alike."""
    progress("measuring the time that a tile takes")
    models = {variant.name: _opened(folder, variant) for variant in variants if variant.file}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    batch = tile[np.newaxis]
    for run in range(runs + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(batch)
            if run:  # the first call sets up
                seconds[name].append(time.perf_counter() - began)
    return [
        replace(variant, latency=statistics.median(seconds[variant.name])) if variant.file else variant
        for variant in variants
    ]


def _evaluated(
    study: Study,
    variants: Sequence[Variant],
    holdout: Holdout,
    folder: Path,
    threads: int,
    progress: Callable[[str], None],
) -> list[Variant]:
    results = []
    for variant in variants:
        if variant.file:
            progress(f"evaluating {variant.name} on {len(holdout)} holdout images")
            model = _opened(folder, variant)
            tile = study.publishing.tile
            result = holdout.evaluate(model, tile=tile, threads=threads, fixed_batch=True, batch_size=1)
            variant = replace(variant, result=result)
        results.append(variant)
    return results


def _opened(folder: Path, variant: Variant) -> LiteModel:
    from common.models.lite import LiteModel

    assert variant.file is not None
    return LiteModel(folder / variant.file)


def _figures(study: Study, variant: Variant, reference: Variant) -> dict[str, Any]:
    """One variant's entry in the report; `reference` is float32."""
    dice = variant.result.mean_dice if variant.result else math.nan
    large = variant.result.mean_dice_of_large_sites if variant.result else math.nan
    # float32 is what the others are held against, so it loses nothing, measured or not.
    lost = 0.0 if variant is reference else math.nan
    if variant is not reference and variant.result and reference.result:
        lost = reference.result.mean_dice - dice
    ratio = variant.size / reference.size if variant.size and reference.size else None
    figures = {
        "name": variant.name,
        "file": variant.file,
        "bytes": variant.size,
        "ratio_to_float32": ratio,
        "dice": dice,
        "dice_of_large_sites": large,
        "dice_lost": lost,
        "latency_ms": variant.latency * 1e3 if variant.latency else None,
        "latency_ratio": variant.latency / reference.latency if variant.latency and reference.latency else None,
        "recommended": variant.failure is None and lost <= study.publishing.allowed_dice_loss,
        "failed": variant.failure is not None,
        "note": _note(variant, ratio, lost, study.publishing.allowed_dice_loss),
    }
    return {key: _json_ready(value) for key, value in figures.items()}


def _note(variant: Variant, ratio: float | None, lost: float, allowed: float) -> str:
    if variant.failure is not None:
        return variant.failure
    notes = []
    if variant.float_operations:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(variant.float_operations.items()))
        count = sum(variant.float_operations.values())
        notes.append(f"{count} of {variant.operations} operations stay in floating point: {names}")
    if variant.name != "float32" and ratio is not None and ratio > 0.95:
        notes.append("not smaller than float32")
    if math.isnan(lost):
        notes.append("not measured on a holdout")
    elif lost > allowed:
        notes.append(f"loses {lost:.4f} Dice, more than the {allowed:g} allowed")
    return "; ".join(notes)


# The papers. -------------------------------------------------------------------------------------------------------


def _write_papers(
    study: Study,
    network: Network,
    variants: Sequence[Variant],
    report: Mapping[str, Any],
    holdout: Holdout | None,
    details: Mapping[str, object],
    folder: Path,
) -> None:
    documents = {
        "model_card.md": _model_card(study, network, variants, report, details).encode(),
        "study.yaml": study.to_yaml().encode(),
    }
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    head = study.model.head
    manifest = {
        "format": MANIFEST_FORMAT,
        "wardround": VERSION,
        "study": study.name,
        "version": report["version"],
        "details": details,
        "model": {
            "name": study.model.name,
            "filters": study.model.filters,
            "depth": study.model.depth,
            "normalization": study.model.normalization,
            "parameters": network.parameters,
        },
        "preprocessing": {
            "dimensions": study.task.dimensions,
            "channels": study.task.channels,
            "intensity": study.preprocessing.intensity,
            "tile": study.publishing.tile,
            "axes": ["batch", *("z", "y", "x")[-study.task.dimensions :], "channel"],
            "overlap": study.evaluation.overlap,
            "classes": study.task.classes,
            "labels": study.task.labels,
            "head": head,
            "outputs": study.task.classes if head == "softmax" else study.task.foreground,
        },
        "variants": [
            _manifest_entry(variant, figures) for variant, figures in zip(variants, report["variants"], strict=True)
        ],
        "holdout": {"cases": len(holdout), "sites": _cases_of_sites(variants[0])} if holdout is not None else None,
        "calibration": report["calibration"],
        "documents": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in documents.items()
        },
    }
    text = json.dumps(_json_ready(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _manifest_entry(variant: Variant, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The report's figures, and what identifies and describes the file."""
    entry = dict(figures)
    if variant.file:
        entry |= {
            "sha256": variant.sha256,
            "input": {"shape": variant.input_shape, "dtype": "float32"},
            "output": {"shape": variant.output_shape, "dtype": "float32"},
            "holdout": variant.result.scalars() if variant.result else None,
        }
    if variant.float_operations is not None and variant.operations:
        entry["float_operations"] = dict(variant.float_operations)
        entry["float_share"] = sum(variant.float_operations.values()) / variant.operations
    return entry


def _model_card(
    study: Study,
    network: Network,
    variants: Sequence[Variant],
    report: Mapping[str, Any],
    details: Mapping[str, object],
) -> str:
    task, training = study.task, study.training
    tile = " x ".join(map(str, study.publishing.tile))
    axes = "y, x" if task.dimensions == 2 else "z, y, x"
    stated = [
        f"- {key.replace('_', ' ')}: {_shown(value)}"
        for key, value in details.items()
        if _json_ready(value) is not None
    ]
    failed = [v for v in variants if v.failure]
    parts = [
        f"# {study.name}, version {report['version']}",
        "## Intended use",
        f"Segmentation of {', '.join(task.foreground)} in {task.dimensions}D images of {task.channels} "
        f"{'channel' if task.channels == 1 else 'channels'}, for research. It is no medical device: nobody has shown "
        "that it is safe to diagnose or treat with. Check its results on images of your own before you rely on them.",
        f"Input: one tile of {tile} voxels ({axes}), prepared as `intensity: {study.preprocessing.intensity}` in "
        f"`study.yaml`. Output: probabilities of {', '.join(_outputs(study))} ({study.model.head}). Larger images are "
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
        "## Files",
        _files_table(report["variants"]),
        "Dice is the mean over the holdout's images, 1 is perfect; lost is against float32. The time is the median of "
        "a tile on one thread of the machine that published, so compare only the ratios. Recommended are files that "
        f"lose at most {study.publishing.allowed_dice_loss:g} Dice.",
        "\n".join(f"- {v['name']}: {v['note']}." for v in report["variants"] if v["note"]),
        *(["## Holdout Dice", _site_table(variants)] if variants[0].result else []),
        "## Limits",
        _limits(variants, report, bool(failed)),
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


def _limits(variants: Sequence[Variant], report: Mapping[str, Any], has_failed: bool) -> str:
    limits = [
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
            "figures may be slightly too good. The manifest names them."
        )
    if has_failed:
        limits.append("Variants marked as none could not be made; the reasons are given under Files.")
    return "\n".join(f"- {limit}" for limit in limits)


def _outputs(study: Study) -> tuple[str, ...]:
    return study.task.classes if study.model.head == "softmax" else study.task.foreground


def _holdout_words(variant: Variant) -> str:
    count = len(variant.result.cases) if variant.result else 0
    return f"{count} holdout {'image' if count == 1 else 'images'} of the coordinator's own"


def _cases_of_sites(variant: Variant) -> dict[str, int]:
    return variant.result.cases_of_sites if variant.result else {}


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no -0.0000


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json_ready(value: object) -> Any:
    """Plain JSON values: NumPy numbers unpacked, and null for a figure that does not exist."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


# Around it. --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes `folder` at the end, and is gone after a failure.

    What an earlier attempt at the same version left behind when its process was killed is removed.
    """
    prefix, suffix = f".{folder.name}.", ".partial"
    try:
        for left in folder.parent.glob(f"{prefix}*{suffix}"):
            shutil.rmtree(left)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=suffix))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            path.chmod(0o644)
            _sync(path)
        partial.chmod(0o755)
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(folder: Path, error: OSError) -> PublishError:
    return PublishError(f"{folder}: cannot be written ({error.strerror}); check its folder and free space")


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
