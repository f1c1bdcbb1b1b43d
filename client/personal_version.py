"""A personal model as a folder that prediction accepts: the published version's papers, with files of its own."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from client.datasets import SiteDataset
from client.personalize import Personalized, Progress, mean_dice, predictor, report_of, validation_dice
from common.errors import PublishError, RunFolderError
from common.export.conversion import convert
from common.inference.golden import GOLDEN, Golden, load_golden
from common.inference.lite import LiteModel
from common.inference.published import MANIFEST
from common.inference.version_files import origin_of
from common.models import build_network
from common.models.network import Network
from common.version import VERSION
from common.whole_folder import appearing_whole
from common.wire.tensors import write_tensors

VARIANTS = ("float32", "dynamic_range")
_LARGEST_DIFFERENCE = 1e-3
_RUNS = 5


def write_personal(
    result: Personalized, model: Path, out: Path, dataset: SiteDataset, progress: Progress = lambda _: None
) -> None:
    """Convert, check, and measure the personal weights on the site's validation cases; write it all to `out`.

    Raises
    ------
    PublishError : the weights do not convert, or the file does not compute what they do.
    RunFolderError : the folder cannot be written.
    """
    study = result.base.study
    network = build_network(study)
    tile = load_golden(model).tile
    manifest: dict[str, Any] = json.loads((model / MANIFEST).read_bytes())
    with appearing_whole(out, RunFolderError) as partial:
        for name in VARIANTS:
            progress(f"converting to {name}")
            (partial / f"model_{name}.tflite").write_bytes(convert(study, network, result.weights, name, []))
        models = {name: LiteModel(partial / f"model_{name}.tflite") for name in VARIANTS}
        golden = Golden(tile, models["float32"](tile[np.newaxis])[0])
        _check(result, network, golden)
        entries = _entries(result, partial, models, dataset, tile, progress)
        pair = golden.to_bytes()
        (partial / GOLDEN).write_bytes(pair)
        stored = write_tensors(partial / "weights.tensors", list(result.weights))
        documents = {
            "model_card.md": _card(result).encode(),
            "study.yaml": (model / "study.yaml").read_bytes(),  # of the very digest that the base's manifest has
        }
        for name, content in documents.items():
            (partial / name).write_bytes(content)
        tolerance = {name: max(2 * golden.difference(one), 1e-3) for name, one in models.items()}
        manifest |= {
            "wardround": VERSION,
            "version": f"{result.base.version}-personal",
            "model": {**manifest["model"], "works_alone": True},
            "details": {"personalized_from": origin_of(result.base)},
            "personal": {key: value for key, value in report_of(result, out).items() if key != "folder"},
            "variants": entries,
            "holdout": None,
            "explanation": None,  # the base's explains the base
            "weights": {"file": "weights.tensors", "sha256": stored.digest.hex(), "bytes": stored.size},
            "golden": {**manifest["golden"], **_identified(pair), "tolerance": tolerance},
            "calibration_images": 0,
            "documents": {name: _identified(content) for name, content in documents.items()},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _check(result: Personalized, network: Network, golden: Golden) -> None:
    expected = predictor(result.base.study, network, result.weights)(golden.tile[np.newaxis])[0]
    difference = float(np.abs(golden.answer - expected).max())
    if not difference <= _LARGEST_DIFFERENCE:
        raise PublishError(
            f"float32: the converted model differs from TensorFlow by {difference:.2g} on one tile; it is not kept: "
            "use the published model"
        )


def _entries(
    result: Personalized,
    folder: Path,
    models: Mapping[str, LiteModel],
    dataset: SiteDataset,
    tile: Any,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The manifest's entries of the files; Dice is that of the site's validation cases."""
    study = result.base.study
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_RUNS + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(tile[np.newaxis])
            seconds[name].append(time.perf_counter() - began)
    latency = {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}
    entries: list[dict[str, Any]] = []
    for name, model in models.items():
        progress(f"measuring {name}")
        dice = mean_dice(validation_dice(study, dataset, _one_by_one(model)))
        lost = 0.0 if not entries else entries[0]["dice"] - dice
        path = folder / f"model_{name}.tflite"
        size = path.stat().st_size
        recommended = lost <= study.publishing.allowed_dice_loss
        note = f"Dice on this site's {result.validation_cases} validation cases"
        if not recommended:
            note += f"; loses {lost:.4f}, more than the {study.publishing.allowed_dice_loss:g} allowed"
        entries.append(
            {
                "name": name,
                "file": path.name,
                "bytes": size,
                "ratio_to_float32": size / (entries[0]["bytes"] if entries else size),
                "dice": dice,
                "dice_lost": lost,
                "latency_ms": latency[name],
                "latency_ratio": latency[name] / latency["float32"],
                "recommended": recommended,
                "failed": False,
                "note": note,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "input": {"shape": model.input_shape, "dtype": "float32"},
                "output": {"shape": model.output_shape, "dtype": "float32"},
                "holdout": None,
            }
        )
    return entries


def _one_by_one(model: LiteModel) -> Any:
    return lambda tiles: np.concatenate([model(tile[np.newaxis]) for tile in tiles])


def _identified(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _card(result: Personalized) -> str:
    study = result.base.study
    lines = [
        f"# {study.name}, {result.base.version}, personal",
        f"Version {result.base.version} of {study.name} (weights of SHA-256 {result.base.sha256[:16]}…), fine-tuned on "
        f"{result.training_cases} cases of this site. It is for images of this site; nobody has measured it on others. "
        "It is no medical device.",
        "| Dice on the site's validation cases | before | after |\n|---|---:|---:|\n"
        + "\n".join(f"| {name} | {result.before[name]:.4f} | {result.after[name]:.4f} |" for name in result.before),
        f"{result.validation_cases} validation cases, which fine-tuning did not train on; neither did the study, if "
        "the data set is the one that it had. The model was kept because it gained on these very cases: with few of "
        "them, part of the gain may be chance.",
    ]
    return "\n\n".join(lines) + "\n"
