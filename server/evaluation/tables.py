"""What `wardround evaluate` shows of a published version: the metrics by site and class, and those of objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from common.metrics.instances import IOU_PERCENTS, SIZE_NAMES
from server.evaluation.detailed import FIGURES
from server.evaluation.result import LARGE_SITE_CASES
from server.status import clean, count, figure

_HEADINGS = ("Dice", "IoU", "precision", "recall", "HD95", "surface Dice")
_LARGE = f"mean of sites with {LARGE_SITE_CASES} or more"


def tables(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """The tables of what `DetailedResult.scalars` returns, and what is to be said of them."""
    yield _figures(result)
    tolerance = f"{result['surface_tolerance']:g}"
    yield (
        f"HD95, and the tolerance of surface Dice ({tolerance}), are in the images' unit: mm, um in microscopy, pixels "
        "where the files state no size."
    )
    if "instances" in result:
        yield _average_precision(result)
        yield _sizes(result)


def _figures(result: Mapping[str, Any]) -> Table:
    classes = list(result["class"])
    table = _table("Holdout", ["images of", *(["class"] if len(classes) > 1 else []), *_HEADINGS, "ECE", "cases"])
    for name, part in _parts(result):
        style = "bold" if part is result else None
        cells = [_of(part, key) for key in (*FIGURES, "ece")]
        if len(classes) == 1:
            table.add_row(_name(name), *cells, str(part["cases"]), style=style)
            continue
        for index, (label, figures) in enumerate(part["class"].items()):
            table.add_row(_name(name) if index == 0 else "", _name(label), *(_of(figures, key) for key in FIGURES))
        table.add_row("", "mean", *cells, str(part["cases"]), style=style)
    if large := result.get("large_sites"):
        middle = ["mean"] if len(classes) > 1 else []
        table.add_row(_LARGE, *middle, *(_of(large, key) for key in (*FIGURES, "ece")), count(large["sites"], "site"))
    return table


def _average_precision(result: Mapping[str, Any]) -> Table:
    thresholds = [f"{percent / 100:.2f}" for percent in IOU_PERCENTS]
    table = _table("Objects: average precision, TP / (TP + FP + FN), by IoU", ["images of", *thresholds, "objects"])
    for name, part in _parts(result):
        counted = part["instances"]
        table.add_row(
            _name(name),
            *(figure(counted["ap"][threshold]) for threshold in thresholds),
            str(counted["objects"]),
            style="bold" if part is result else None,
        )
    if large := result.get("large_sites"):
        table.add_row(
            _LARGE, *(figure(large["ap"][threshold]) for threshold in thresholds), count(large["sites"], "site")
        )
    return table


def _sizes(result: Mapping[str, Any]) -> Table:
    headings = [heading for size in SIZE_NAMES for heading in (size, "n")]
    table = _table("Objects: F1 at an IoU of 0.5, by diameter in pixels; n objects", ["images of", *headings])
    for name, part in _parts(result):
        counted = part["instances"]
        cells = [
            text
            for size in SIZE_NAMES
            for text in (figure(counted["f1_of_sizes"][size]), str(counted["objects_of_sizes"][size]))
        ]
        table.add_row(_name(name), *cells, style="bold" if part is result else None)
    return table


def _parts(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from sorted((result.get("site") or {}).items())
    if "other" in result:
        yield "other", result["other"]
    yield "all", result


def _of(figures: Mapping[str, Any], key: str) -> str:
    return figure(figures.get(key), 4 if key == "ece" else 2 if key == "hd95" else 3)


def _name(name: str) -> Text:
    return Text(clean(name))  # brackets in it are no markup


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(Text(heading), justify="left" if heading in ("images of", "class") else "right")
    return table
