"""A personal model as a folder that prediction accepts: the published version's papers, with files of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from client.datasets import SiteDataset
from client.personalize import Personalized, Progress, mean_dice, report_of, validation_dice
from common.errors import PublishError, RunFolderError
from common.export.conversion import Tile, convert
from common.export.figures import LARGEST_DIFFERENCE, median_seconds
from common.export.forward import predictor
from common.export.papers import write_beside, write_manifest
from common.inference.golden import Golden, load_golden
from common.inference.lite import LiteModel
from common.inference.published import Verify, read_manifest, sha256_of
from common.inference.signature import PERSONAL
from common.inference.version_files import origin_of
from common.models import build_network
from common.models.network import Network
from common.security.signing import Signer
from common.version import VERSION
from common.whole_folder import appearing_whole

VARIANTS = ("float32", "dynamic_range")
_RUNS = 5


def write_personal(
    result: Personalized,
    model: Path,
    out: Path,
    dataset: SiteDataset,
    progress: Progress = lambda _: None,
    signer: Signer | None = None,
    verify: Verify | None = None,
) -> None:
    """Convert, check, and measure the personal weights on the site's validation cases; write it all to `out`.

    `signer` signs it for the site, where it has a key; `verify` checks once more whose the published version is.

    Raises
    ------
    PublishError : the weights do not convert, or the file does not compute what they do.
    RunFolderError : the folder cannot be written.
    """
    study = result.base.study
    network = build_network(study)
    tile = load_golden(model).tile
    base = read_manifest(model, verify)
    with appearing_whole(out, RunFolderError) as partial:
        for name in VARIANTS:
            progress(f"converting to {name}")
            (partial / f"model_{name}.tflite").write_bytes(convert(study, network, result.weights, name, []))
        models = {name: LiteModel(partial / f"model_{name}.tflite") for name in VARIANTS}
        golden = Golden(tile, models["float32"](tile[np.newaxis])[0])
        _check(result, network, golden)
        entries = _entries(result, partial, models, dataset, tile, progress)
        documents = {
            "model_card.md": _card(result).encode(),
            "study.yaml": (model / "study.yaml").read_bytes(),  # of the very digest that the base's manifest has
        }
        differences = {name: golden.difference(one) for name, one in models.items()}
        papers = write_beside(partial, result.weights, golden, differences, documents)
        manifest = {
            **base,
            "wardround": VERSION,
            "version": f"{result.base.version}-personal",
            "model": {**base["model"], "works_alone": True},
            "details": {"personalized_from": origin_of(result.base)},
            PERSONAL: {key: value for key, value in report_of(result, out).items() if key != "folder"},
            "variants": entries,
            "holdout": None,
            "explanation": None,  # the base's explains the base
            "calibration_images": 0,
            **papers,
        }
        write_manifest(partial, manifest, signer)


def _check(result: Personalized, network: Network, golden: Golden) -> None:
    expected = predictor(result.base.study, network, result.weights)(golden.tile[np.newaxis])[0]
    difference = float(np.abs(golden.answer - expected).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise PublishError(
            f"float32: the converted model differs from TensorFlow by {difference:.2g} on one tile; it is not kept: "
            "use the published model"
        )


def _entries(
    result: Personalized,
    folder: Path,
    models: Mapping[str, LiteModel],
    dataset: SiteDataset,
    tile: Tile,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The manifest's entries of the files; Dice is that of the site's validation cases."""
    study = result.base.study
    seconds = median_seconds(models, tile, _RUNS)
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
                "latency_ms": 1e3 * seconds[name],
                "latency_ratio": seconds[name] / seconds["float32"],
                "recommended": recommended,
                "failed": False,
                "note": note,
                "sha256": sha256_of(path),
                "input": {"shape": model.input_shape, "dtype": "float32"},
                "output": {"shape": model.output_shape, "dtype": "float32"},
                "holdout": None,
            }
        )
    return entries


def _one_by_one(model: LiteModel) -> Any:
    return lambda tiles: np.concatenate([model(tile[np.newaxis]) for tile in tiles])


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
