"""Which way of telling touching objects apart is best?

Trains the shipped nuclei study's U-Net on the images of five hospitals pooled, once with the head "sigmoid" and once
with the head "distance": the same steps, initial weights, patches and augmentations. Then compares ways to objects:

- sigmoid, components: what hangs together is one object.
- sigmoid, shape: watershed of each voxel's distance to the background.
- distance, components and distance, shape: the same of the other network's foreground, which shows what its second
  output adds beyond training.
- distance, distance: watershed of the predicted distance.
- distance, both: watershed of the mean of the predicted distance and that to the background.

Threshold, smoothing, height and least size of each are tuned on the sites' own validation cases (12 of a site at most),
one after the other in two passes, by the mean over sites of the mean average precision from IoU 0.5 to 0.9; the holdout
only reports.

How to read it: AP is TP / (TP + FP + FN) at an IoU, of all objects of a site's cases together; "mean" is that over
0.50, 0.55, ... 0.90. Dice is that of the foreground, as mean over cases. "all sites" is the mean over the sites.

Rows that `results/instances.csv` already has (of the same arm, steps and seed) are not computed again, and weights that
`--weights` holds are not trained again, so a run that was interrupted goes on after the last network it finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks._pooled import (
    Data,
    Labelled,
    Row,
    each_case,
    predictor,
    prepare,
    read_rows,
    shipped_study,
    train,
    write_between,
)
from benchmarks._report import RESULTS, report
from common.errors import DataError
from common.imaging.sliding_window import predict_tiled
from common.inference.instances import Method, Splitting, instances_of
from common.learning.runtime import configure_tensorflow
from common.metrics.instances import IOU_PERCENTS, InstanceCounts, match_instances
from common.metrics.overlap import count_overlap
from common.study import Study

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs" / "instances.md"
_BEGIN, _END = "<!-- instances: begin -->\n", "<!-- instances: end -->\n"
_NAME = "instances"
_ALL = "all sites"
_PERCENTS = (50, 60, 70, 80, 90)

Head = Literal["sigmoid", "distance"]
_TEXTS = frozenset({"arm", "side", "site"})
_WHOLE = frozenset({"steps", "seed", "filters", "cases", "objects", "least_size"})


@dataclass(frozen=True)
class Arm:
    """One way from an image to objects."""

    head: Head
    method: Method

    @property
    def name(self) -> str:
        return f"{self.head}, {self.method}"


ARMS = (
    Arm("sigmoid", "components"),
    Arm("sigmoid", "shape"),
    Arm("distance", "components"),
    Arm("distance", "shape"),
    Arm("distance", "distance"),
    Arm("distance", "both"),
)

_GRID: Mapping[str, tuple[Any, ...]] = {
    "height": (0.03, 0.06, 0.1, 0.15, 0.2, 0.3),
    "smoothing": (0.5, 1.0, 1.5, 2.0),
    "threshold": (0.3, 0.4, 0.5, 0.6),
    "least_size": (0, 12, 24, 48),
}
_TUNED_ON = 12
_UNUSED = {"components": ("smoothing", "height"), "shape": (), "distance": (), "both": ()}

_SHOWN = {
    "arm": "arm",
    "side": "side",
    "site": "site",
    "cases": "cases",
    "objects": "objects",
    **{f"ap{percent}": f"AP {percent / 100}" for percent in _PERCENTS},
    "ap_mean": "mean",
    "dice": "Dice",
}


def main() -> None:
    """Trains and evaluates what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the five sites' folders and `holdout`")
    parser.add_argument("--weights", type=Path, help="a folder that keeps each trained network's weights")
    parser.add_argument("--steps", type=int, default=1700, help="training steps of each network (default: 1700)")
    parser.add_argument("--filters", type=int, default=16, help="of the U-Net (default: 16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="networks for each seed (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads (default: 2)")
    parser.add_argument("--write-docs", action="store_true", help="only write the table into docs/instances.md")
    options = parser.parse_args()
    if options.write_docs:
        kept = {"steps": options.steps, "filters": options.filters}
        write_docs(_DOCS, [row for row in _known() if all(row[key] == value for key, value in kept.items())])
        return
    if options.data is None:
        parser.error("--data: give the folder that holds the sites' folders and `holdout`")
    if min(options.steps, options.threads, options.filters) < 1:
        parser.error("--steps, --threads, --filters: expected positive numbers")
    configure_tensorflow(options.threads)
    for seed in options.seeds:
        for head in ("sigmoid", "distance"):
            known = {(row["arm"], row["steps"], row["seed"], row["filters"]) for row in _known()}
            missing = [
                arm
                for arm in ARMS
                if arm.head == head and (arm.name, options.steps, seed, options.filters) not in known
            ]
            if not missing:
                continue
            study = nuclei_study(head, options.filters)
            try:
                data = Data.load(study, options.data)
            except DataError as error:
                parser.error(str(error))
            weights = _weights(data, options.steps, seed, options.weights)
            for rows in _measured(data, weights, missing, options.threads):
                shared: Row = {"steps": options.steps, "seed": seed, "filters": options.filters}
                report(_NAME, [*_known(), *(shared | row for row in rows)], _SHOWN)


def nuclei_study(head: Head, filters: int) -> Study:
    """The nuclei study as it is shipped, with a head."""
    study = shipped_study("nuclei")
    return dataclasses.replace(study, model=dataclasses.replace(study.model, head=head, filters=filters))


# One network. ------------------------------------------------------------------------------------------------------


def _weights(data: Data, steps: int, seed: int, folder: Path | None) -> list[Any]:
    """Trained, or as the folder has them, in a file whose name says which network's they are."""
    from common.models import build_network

    model = data.study.model
    path = None if folder is None else folder / f"{model.head}-{model.filters}-{steps}-{seed}.npz"
    if path is not None and path.exists():
        with np.load(path) as stored:
            return [stored[name] for name in stored.files]
    print(f"training {model.head}, seed {seed}", flush=True)
    weights = train(data, build_network(data.study), data.study.augmentation, steps, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, *weights)
        partial.replace(path)
    return weights


@dataclass(frozen=True, eq=False)
class _Predicted:
    case: Labelled
    maps: npt.NDArray[np.float32]


def _measured(data: Data, weights: list[Any], arms: Sequence[Arm], threads: int) -> Iterator[list[Row]]:
    """The rows of each arm, once it is tuned and measured."""
    from common.models import build_network

    study = data.study
    predict = predictor(study, build_network(study), weights)

    def predicted_of(_: int, case: Labelled) -> _Predicted:
        image = prepare(study, case.stored)
        return _Predicted(case, predict_tiled(predict, image, study.publishing.tile, study.evaluation.overlap, 4))

    sides = {
        side: each_case(cases, threads, predicted_of)
        for side, cases in (("validation", data.validation), ("holdout", data.holdout))
    }
    for arm in arms:
        started = time.perf_counter()
        splitting = tune(arm, _some(sides["validation"]), threads)
        tuned = time.perf_counter() - started
        rows: list[Row] = []
        for side, predicted in sides.items():
            counts = _counts(arm, predicted, splitting, threads)
            dice = [_dice(one, splitting.threshold) for one in predicted]
            rows += _rows(side, [one.case.site for one in predicted], counts, dice)
        chosen = {key: getattr(splitting, key) for key in _GRID}
        yield [{"arm": arm.name, **row, **chosen, "tuning_seconds": round(tuned, 1)} for row in rows]


def _some(predicted: Sequence[_Predicted]) -> list[_Predicted]:
    """The first cases of each site: enough to tune on, and no site takes most of the time."""
    taken: Counter[str] = Counter()
    chosen = []
    for one in predicted:
        taken[one.case.site] += 1
        if taken[one.case.site] <= _TUNED_ON:
            chosen.append(one)
    return chosen


def tune(arm: Arm, predicted: Sequence[_Predicted], threads: int) -> Splitting:
    """The splitting of the highest mean AP on these cases, one setting after the other, in two passes."""
    best = Splitting(method=arm.method)
    score = _score(arm, predicted, best, threads)
    for _ in range(2):
        before = best
        for key in (key for key in _GRID if key not in _UNUSED[arm.method]):
            for value in _GRID[key]:
                if value == getattr(best, key):
                    continue
                tried = dataclasses.replace(best, **{key: value})
                reached = _score(arm, predicted, tried, threads)
                if reached > score:
                    best, score = tried, reached
        if best == before:
            break
    print(f"{arm.name}: {best}, validation {score:.4f}", flush=True)
    return best


def _score(arm: Arm, predicted: Sequence[_Predicted], splitting: Splitting, threads: int) -> float:
    counts = _counts(arm, predicted, splitting, threads)
    sites = _by_site([one.case.site for one in predicted], counts)
    return float(np.mean([np.mean(total.average_precision()) for total in sites.values()]))


def _counts(arm: Arm, predicted: Sequence[_Predicted], splitting: Splitting, threads: int) -> list[InstanceCounts]:
    def count(one: _Predicted) -> InstanceCounts:
        return match_instances(instances_of(one.maps, arm.head, splitting), one.case.objects)

    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(count, predicted))


def _dice(one: _Predicted, threshold: float) -> float:
    found = (one.maps[..., 0] > threshold).astype(np.uint8)
    return float(count_overlap(found, (one.case.objects > 0).astype(np.uint8), 2).dice()[0])


def _by_site(sites: Sequence[str], counts: Sequence[InstanceCounts]) -> dict[str, InstanceCounts]:
    return {
        site: sum((one for name, one in zip(sites, counts, strict=True) if name == site), InstanceCounts.zero())
        for site in sorted(set(sites))
    }


def _rows(side: str, sites: Sequence[str], counts: Sequence[InstanceCounts], dice: Sequence[float]) -> list[Row]:
    """A row for each site, and their mean."""
    rows: list[Row] = []
    for site, total in _by_site(sites, counts).items():
        values = [value for name, value in zip(sites, dice, strict=True) if name == site and not math.isnan(value)]
        precision = total.average_precision()
        at: Row = {f"ap{percent}": round(float(precision[IOU_PERCENTS.index(percent)]), 4) for percent in _PERCENTS}
        about: Row = {"side": side, "site": site, "cases": sites.count(site), "objects": total.objects}
        means: Row = {"ap_mean": round(float(np.mean(precision)), 4), "dice": round(float(np.mean(values)), 4)}
        rows.append(about | at | means)
    figures = [*(f"ap{percent}" for percent in _PERCENTS), "ap_mean", "dice"]
    mean: Row = {key: round(float(np.mean([float(row[key]) for row in rows])), 4) for key in figures}
    totals: Row = {key: sum(int(row[key]) for row in rows) for key in ("cases", "objects")}
    return [*rows, {"side": side, "site": _ALL} | totals | mean]


# The rows. ---------------------------------------------------------------------------------------------------------


def _known() -> list[Row]:
    """What was measured so far."""
    return read_rows(_NAME, _TEXTS, _WHOLE)


def write_docs(path: Path, rows: Sequence[Row]) -> None:
    """Put the table of these rows, means over their seeds, between the marks in the page."""
    if not rows:
        raise SystemExit(f"{RESULTS / _NAME}.csv: no rows of so many steps and filters; run the benchmark first")
    write_between(path, _BEGIN, _END, table(rows))


def table(rows: Sequence[Row]) -> str:
    """Markdown: the holdout by site and arm; the arm of the highest validation mean in bold."""

    def mean(key: str, **wanted: str) -> float:
        chosen = [float(row[key]) for row in rows if all(row[name] == value for name, value in wanted.items())]
        return float(np.mean(chosen))

    arms = [arm.name for arm in ARMS if any(row["arm"] == arm.name for row in rows)]
    best = max(arms, key=lambda arm: mean("ap_mean", arm=arm, side="validation", site=_ALL))
    of_sides = ({str(row["site"]) for row in rows if row["side"] == side} for side in ("validation", "holdout"))
    sites = sorted(set.intersection(*of_sides) - {_ALL})
    steps, seeds = rows[0]["steps"], len({row["seed"] for row in rows})
    figures = [*(f"ap{percent}" for percent in _PERCENTS), "ap_mean", "dice"]
    lines = [
        "",
        f"{steps} steps of each network, {seeds} run(s). Average precision of the holdout by IoU; tuned on the sites'",
        "validation cases, whose mean over sites and IoU stands in the first column. Bold: the highest there.",
        "",
        "| site | head, method | validation | "
        + " | ".join(f"AP {percent / 100}" for percent in _PERCENTS)
        + " | mean | Dice |",
        "|---|---|---:|" + "---:|" * len(figures),
    ]
    for site in [*sites, _ALL]:
        objects = next(row for row in rows if row["site"] == site and row["side"] == "holdout")
        for arm in arms:
            cells = [f"{mean('ap_mean', arm=arm, side='validation', site=site):.3f}"]
            cells += [f"{mean(key, arm=arm, side='holdout', site=site):.3f}" for key in figures]
            heading = f"{site} ({objects['cases']} cases, {objects['objects']} objects)" if arm == arms[0] else ""
            lines.append(f"| {heading} | {f'**{arm}**' if arm == best else arm} | {' | '.join(cells)} |")
    lines += ["", "Tuned threshold, smoothing, height and least size, of the first seed:", ""]
    for arm in arms:
        row = next(row for row in rows if row["arm"] == arm)
        lines.append(f"- {arm}: {row['threshold']}, {row['smoothing']}, {row['height']}, {row['least_size']}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
