"""Writes what a run of a shipped study reached into `docs/results.md`, and its rounds as CSV beside it.

Measures nothing itself: the figures are those of the run's `rounds.csv` and of a published version's manifest.

    python -m benchmarks.results_page nuclei RUN
    python -m benchmarks.results_page hippocampus RUN --version v2
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._pooled import ROOT, write_between
from common.errors import WardroundError
from common.inference.published import read_manifest
from server.evaluation.result import LARGE_SITE_CASES
from server.pseudonyms import pseudonyms
from server.run_folder import RunFolder
from server.versions import newest_version, published_versions

_PAGE = ROOT / "docs" / "results.md"
_OF_CASES = "holdout/case/"
_IOUS = ("0.50", "0.55", "0.60", "0.65", "0.70", "0.75", "0.80", "0.85", "0.90")


def main() -> None:
    """Writes the section of one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("nuclei", "hippocampus"))
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--version", help="a published version, such as v2 (default: the newest)")
    options = parser.parse_args()
    run = RunFolder(options.run)
    try:
        versions = published_versions(run.published)
        version = versions.get(options.version) if options.version else newest_version(run)
        if version is None:
            parser.error(f"{run.published}: no such version")
        manifest = read_manifest(version)
        study = run.read_study()
        names = {code: site for site, code in pseudonyms(run, study.name, study.cohort.sites).items()}
    except WardroundError as error:
        parser.error(str(error))
    with run.rounds.open(newline="") as file:
        rounds = list(csv.DictReader(file))
    seconds = float(json.loads(run.report.read_text())["seconds"])
    text = "\n\n".join(
        ["", _sentence(manifest, seconds), *_tables(manifest, names), _rounds(rounds), _variants(manifest), ""]
    )
    write_between(_PAGE, f"<!-- {options.study}: begin -->", f"<!-- {options.study}: end -->", text)
    write_rounds(_PAGE.parent / "results" / f"{options.study}-rounds.csv", rounds)


def write_rounds(path: Path, rounds: Sequence[Mapping[str, str]]) -> None:
    """The run's `rounds.csv` but for single cases."""
    names = [name for name in rounds[0] if not name.startswith(_OF_CASES)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounds)


def _sentence(manifest: Mapping[str, Any], seconds: float) -> str:
    details = manifest["details"]
    return (
        f"{seconds / 60:.0f} min from command to published model, other work on the machine beside it. Published is\n"
        f"round {details['round']}, validation Dice {details['validation_dice']:.3f}. Of its float32 file:"
    )


def _tables(manifest: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """The holdout by site, named as its pseudonym says, and where there are objects their average precision."""
    found = next(variant for variant in manifest["variants"] if variant["name"] == "float32")["holdout"]
    sites = {names.get(site, site): part for site, part in found["site"].items()}
    parts = {**dict(sorted(sites.items())), "all cases": found}
    classes = list(found["class"])
    each = classes if len(classes) > 1 else []
    rows = [
        [
            name,
            f"{part['dice']:.3f}",
            *(f"{part['class'][label]['dice']:.3f}" for label in each),
            *(f"{part[key]:.3f}" for key in ("iou", "surface_dice")),
            f"{part['hd95']:.2f}",
            str(part["cases"]),
        ]
        for name, part in parts.items()
    ]
    large = found.get("large_sites")
    if large and large["sites"] > 1:
        figures = [f"{large['dice']:.3f}", *[""] * len(each), *(f"{large[key]:.3f}" for key in ("iou", "surface_dice"))]
        rows.append(
            [
                f"mean of sites with {LARGE_SITE_CASES} or more",
                *figures,
                f"{large['hd95']:.2f}",
                f"{large['sites']} sites",
            ]
        )
    tables = [_table(["holdout cases of", "Dice", *each, "IoU", "surface Dice", "HD95", "cases"], rows)]
    if "instances" in found:
        tables.append("Average precision of objects, TP / (TP + FP + FN), by IoU:")
        rows = [
            [name, *(f"{part['instances']['ap'][iou]:.3f}" for iou in _IOUS), str(part["instances"]["objects"])]
            for name, part in parts.items()
        ]
        tables.append(_table(["holdout cases of", *_IOUS, "objects"], rows))
    return tables


def _rounds(rounds: Sequence[Mapping[str, str]]) -> str:
    rows = [
        [
            row["round"],
            *(_figure(row.get(key)) for key in ("train/loss", "validation/dice", "holdout/dice")),
            f"{float(row['seconds']):.1f}",
        ]
        for row in rounds
    ]
    return _table(["round", "training loss", "validation Dice", "holdout Dice", "seconds of training"], rows)


def _figure(text: str | None) -> str:
    """To three decimals; a dash where there is none, as of a round that was skipped."""
    return f"{float(text):.3f}" if text else "–"


def _variants(manifest: Mapping[str, Any]) -> str:
    rows = [
        [
            variant["name"].replace("_", " "),
            f"{variant['bytes']:,}",
            f"{1 / variant['ratio_to_float32']:.2f}x",
            f"{variant['latency_ms']:.1f}",
            f"{1 / variant['latency_ratio']:.2f}x",
            f"{variant['dice']:.4f}",
            f"{variant['dice_lost']:.4f}",
        ]
        for variant in manifest["variants"]
        if not variant["failed"]
    ]
    return _table(["variant", "bytes", "smaller", "ms a tile, one thread", "faster", "Dice", "lost"], rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
