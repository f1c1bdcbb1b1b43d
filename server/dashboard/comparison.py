"""Runs beside each other: the settings that differ, what they ended at, and their curves over each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.webpage.wording import amount, figure
from server.dashboard.figures import MOST_POINTS, Figure, chosen, overlaid, rounded
from server.dashboard.history import Curves, History, last
from server.dashboard.paper import write_paper
from server.dashboard.report import plain_study
from server.run_folder import RunFolder
from server.status import output
from server.watching.snapshot import RunSnapshot, SnapshotReader
from server.wording import clean

_SAME_BY_NATURE: Final = ("study",)
"""Settings whose difference says nothing."""
_ABSENT: Final = "not set"
_WIDEST: Final = 10_000  # letters of a line


@dataclass(frozen=True)
class Figures:
    """A line of the table: what is compared, its values as they are shown, and as they are."""

    label: str
    values: tuple[float | None, ...]
    shown: tuple[str, ...]
    best: int | None


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes
    ----------
    names : of the runs; no two are the same.
    settings : those that differ, by path, with the value of each run.
    figures : what they ended at.
    charts : their curves.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    settings: tuple[tuple[str, tuple[Any, ...]], ...]
    figures: tuple[Figures, ...]
    charts: dict[str, Figure]

    def plain(self) -> dict[str, Any]:
        """For programs."""
        return {
            "runs": [{"name": name, "path": path} for name, path in zip(self.names, self.paths, strict=True)],
            "settings": {path: dict(zip(self.names, values, strict=True)) for path, values in self.settings},
            "figures": {one.label: dict(zip(self.names, one.values, strict=True)) for one in self.figures},
        }


def compare(runs: Sequence[RunFolder]) -> Comparison:
    """Compares runs. Raises RunFolderError where one is none, or cannot be read."""
    settings = [plain_study(run.read_study()) for run in runs]
    snapshots = [SnapshotReader(run.path).read() for run in runs]
    curves = [History.of(snapshot).curves for snapshot in snapshots]
    names = _names([run.path for run in runs])
    paths = dict.fromkeys(path for each in settings for path in each)
    differing = [
        (path, tuple(each.get(path, _ABSENT) for each in settings))
        for path in paths
        if path not in _SAME_BY_NATURE and len({json.dumps(each.get(path, _ABSENT)) for each in settings}) > 1
    ]
    return Comparison(
        names=names,
        paths=tuple(str(run.path) for run in runs),
        settings=tuple(differing),
        figures=_figures(snapshots, curves),
        charts=_charts(names, curves),
    )


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Short names: the folder's, with its parent's where that is not enough, and a number where nothing is."""
    names = [path.absolute().name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}/{path.absolute().name}" for path in paths]
    if len(set(names)) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    return tuple(names)


def _figures(snapshots: Sequence[RunSnapshot], curves: Sequence[Curves]) -> tuple[Figures, ...]:
    made: list[Figures] = []

    def line(label: str, values: Sequence[float | None], show: Callable[[float | None], str], better: int = 0) -> None:
        """`better`: 1 where more is, -1 where less is, 0 where neither."""
        known = [(better * value, -place) for place, value in enumerate(values) if value is not None]
        best = -max(known)[1] if better and len({score for score, _ in known}) > 1 else None
        if known:
            made.append(Figures(label, tuple(values), tuple(map(show, values)), best))

    def at_best(column: str) -> list[float | None]:
        """A column in the round of the best holdout Dice, or the best validation Dice where there is no holdout."""
        found: list[float | None] = []
        for each in curves:
            best = each.best("holdout/dice") or each.best("validation/dice")
            found.append(each.column(column)[each.rounds.index(best[0])] if best else None)
        return found

    whole: Callable[[float | None], str] = lambda value: figure(value, 0)  # noqa: E731
    tenths: Callable[[float | None], str] = lambda value: figure(value, 1)  # noqa: E731
    hundredths: Callable[[float | None], str] = lambda value: figure(value, 2)  # noqa: E731
    line("rounds", [float(len(each.rounds)) for each in curves], whole)
    bests = [each.best("holdout/dice") or each.best("validation/dice") for each in curves]
    line("best round", [float(best[0]) if best else None for best in bests], whole)
    line("holdout Dice, best round", at_best("holdout/dice"), figure, 1)
    line("holdout IoU, best round", at_best("holdout/iou"), figure, 1)
    line("validation Dice, best round", at_best("validation/dice"), figure, 1)
    for prefix, words in (("holdout/class/", "Dice of class"), ("holdout/site/", "Dice of images of")):
        names = dict.fromkeys(name for each in curves for name in each.named(prefix, "/dice"))
        for name in names:
            line(f"{words} {name}", at_best(f"{prefix}{name}/dice"), figure, 1)
    line("training loss, last round", [last(each.column("train/loss")) for each in curves], figure)
    line("seconds a round", [_mean_seconds(each) for each in curves], tenths, -1)
    line("epsilon spent", [(each.privacy or {}).get("epsilon") for each in snapshots], hundredths, -1)
    variants = [_recommended(each) for each in snapshots]
    line("recommended file, bytes", [one.get("bytes") for one in variants], amount, -1)
    line("recommended file, Dice", [one.get("dice") for one in variants], figure, 1)
    line("recommended file, ms", [one.get("latency_ms") for one in variants], tenths, -1)
    return tuple(made)


def _mean_seconds(curves: Curves) -> float | None:
    if not curves.rounds:
        return None
    return sum(map(curves.seconds, range(len(curves.rounds)))) / len(curves.rounds) or None


def _recommended(snapshot: RunSnapshot) -> dict[str, Any]:
    """The smallest recommended file of the newest version; empty where there is none."""
    variants = snapshot.versions[-1]["manifest"].get("variants") or () if snapshot.versions else ()
    fit = [one for one in variants if one.get("recommended") and one.get("bytes")]
    return dict(min(fit, key=lambda one: float(one["bytes"]), default={}))


def _charts(names: Sequence[str], curves: Sequence[Curves]) -> dict[str, Figure]:
    def chart(column: str, title: str, *, unit: bool = False) -> Figure:
        lines = {}
        for name, each in zip(names, curves, strict=True):
            places, values = chosen(len(each.rounds), MOST_POINTS), each.column(column)
            lines[name] = [each.rounds[place] for place in places], [rounded(values[place]) for place in places]
        return overlaid(lines, title, unit=unit)

    made = {
        "Holdout Dice": chart("holdout/dice", "Dice", unit=True),
        "Holdout IoU": chart("holdout/iou", "IoU", unit=True),
        "Validation Dice": chart("validation/dice", "Dice", unit=True),
        "Training loss": chart("train/loss", "loss"),
    }
    for name in dict.fromkeys(name for each in curves for name in each.named("holdout/class/", "/dice")):
        made[f"Holdout Dice of {name}"] = chart(f"holdout/class/{name}/dice", "Dice", unit=True)
    return {name: made for name, made in made.items() if made["data"]}


def print_comparison(found: Comparison) -> None:
    """To the terminal."""
    console = output()
    settings = [(path, [Text(clean(_value(value))) for value in values]) for path, values in found.settings]
    _print_whole(console, _table("Settings that differ", found.names, settings))
    if not found.settings:
        console.print("None: the runs are of one study.")
    console.print()
    rows = [
        (one.label, [Text(text, style="bold" if place == one.best else "") for place, text in enumerate(one.shown)])
        for one in found.figures
    ]
    _print_whole(console, _table("Figures (the best is bold)", found.names, rows))


def _print_whole(console: Console, table: Table) -> None:
    """Prints a table; folds nothing where no window limits it, however many runs there are."""
    if not console.is_terminal:
        needed = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
        console.width = max(console.width, needed)
    console.print(table)


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(Text(clean(name)), justify="right", overflow="fold")
    for label, cells in rows:
        table.add_row(Text(clean(label)), *cells)
    return table


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_comparison(found: Comparison, out: Path) -> Path:
    """Writes the comparison as one HTML file. Raises RunFolderError where it cannot be written."""
    return write_paper(
        out,
        "comparison.html",
        found.charts,
        title=f"{' and '.join(found.names)}: compared" if len(found.names) < 4 else f"{len(found.names)} runs compared",
        names=found.names,
        settings=[(path, [_value(value) for value in values]) for path, values in found.settings],
        rows=found.figures,
        charts=list(found.charts),
    )
