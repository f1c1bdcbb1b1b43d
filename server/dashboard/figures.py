"""The charts of a run, as plain values that Plotly draws; colours and letters are the page's own.

Long studies are thinned: a chart draws at most `MOST_POINTS` rounds, evenly chosen, the newest always, and from more
than `MOST_LINES` lines on a map of colours stands in their place. So 500 rounds of 50 sites draw as fast as 20 of 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from server.dashboard.history import Curves, History, mean

MOST_POINTS: Final = 200
MOST_BARS: Final = 60
MOST_LINES: Final = 8
FEW_ROUNDS: Final = 10
_DIGITS: Final = 4

Figure = dict[str, Any]


def chosen(length: int, most: int = MOST_POINTS) -> list[int]:
    """At most so many places of a list, evenly chosen; the last is always among them.

    >>> chosen(3), chosen(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    step = max(math.ceil(length / most), 1)
    return list(range((length - 1) % step, length, step)) if length else []


def figures(history: History, *, budget: float | None = None) -> dict[str, Figure]:
    """All charts of a run, by name.

    Parameters
    ----------
    budget : of epsilon, where the study has privacy.
    """
    curves = history.curves
    places = chosen(len(curves.rounds))
    x = [curves.rounds[place] for place in places]

    def at(column: Sequence[float | None]) -> list[float | None]:
        return [rounded(column[place]) for place in places]

    made = {
        "quality": lines(
            x,
            {
                "holdout": at(curves.column("holdout/dice")),
                "validation at the sites": at(curves.column("validation/dice")),
            },
            "Dice",
            unit=True,
        ),
        "loss": lines(x, {"training loss": at(curves.column("train/loss"))}, "loss"),
        "time": times(curves),
    }
    for measure in ("dice", "iou"):
        name = {"dice": "Dice", "iou": "IoU"}[measure]
        classes = {each: at(column) for each, column in curves.named("holdout/class/", f"/{measure}").items()}
        origins = {each: at(column) for each, column in curves.named("holdout/site/", f"/{measure}").items()}
        made[f"class-{measure}"] = lines(x, classes, name, unit=True)
        made[f"class-{measure}"]["layout"]["showlegend"] = True  # it names the class where there is one only
        made[f"origin-{measure}"] = lines_or_map(x, origins, name)
    if budget is not None:
        spent = {"spent": at(curves.column("epsilon"))}
        made["epsilon"] = lines(x, spent, "epsilon")
        made["epsilon"]["layout"]["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": budget, "y1": budget, "line": {"dash": "dash"}}
        ]
    return made


def lines(x: Sequence[int], columns: Mapping[str, Sequence[float | None]], title: str, *, unit: bool = False) -> Figure:
    """Curves over the rounds; those with no value at all are left out.

    Parameters
    ----------
    unit : the values lie between 0 and 1.
    """
    return overlaid({name: (x, column) for name, column in columns.items()}, title, unit=unit)


def overlaid(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float | None]]], title: str, *, unit: bool = False
) -> Figure:
    """Curves over each other, each with rounds of its own; else as `lines`."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(x) <= 30 else "lines",
            "name": name,
            "x": list(x),
            "y": list(column),
            "hovertemplate": "%{y:.3f}",
            "meta": {"colour": place},
        }
        for place, (name, (x, column)) in enumerate(curves.items())
        if any(value is not None for value in column)
    ]
    rounds = [each for x, _ in curves.values() for each in x]
    return {"data": data, "layout": _layout(title, rounds, unit=unit) if data else _nothing()}


def lines_or_map(x: Sequence[int], columns: Mapping[str, Sequence[float | None]], title: str) -> Figure:
    """Curves, or where they were too many to tell apart, a row of colours for each."""
    if len(columns) <= MOST_LINES:
        return lines(x, columns, title, unit=True)
    names = sorted(columns, reverse=True)  # the first on top
    known = sorted(value for column in columns.values() for value in column if value is not None)
    lowest = known[len(known) // 20] if known else 0.0  # a few bad values are not to take all contrast
    data = {
        "type": "heatmap",
        "x": list(x),
        "y": names,
        "z": [list(columns[name]) for name in names],
        "zmin": math.floor(lowest * 10) / 10,
        "zmax": 1,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": title}, "thickness": 12, "outlinewidth": 0},
        "hovertemplate": "%{y}, round %{x}: %{z:.3f}<extra></extra>",
    }
    layout = _layout("", x)
    layout |= {"hovermode": "closest"}
    layout["yaxis"] = {"tickfont": {"size": 10}, "type": "category"}
    return {"data": [data], "layout": layout}


def times(curves: Curves) -> Figure:
    """How the time of each round was spent; of a long study the means over rounds that follow each other."""
    columns, rounds = curves.times(), curves.rounds
    step = max(math.ceil(len(rounds) / MOST_BARS), 1)
    starts = range(0, len(rounds), step)
    labels = [
        f"{rounds[first]}" if step == 1 else f"{rounds[first]}–{rounds[min(first + step, len(rounds)) - 1]}"
        for first in starts
    ]
    data = [
        {
            "type": "bar",
            "name": part,
            "x": labels,
            "y": [rounded(mean(column[first : first + step]), 2) for first in starts],
            "hovertemplate": "%{y:.1f} s",
            "meta": {"colour": place},
        }
        for place, (part, column) in enumerate(columns.items())
        if any(column)
    ]
    layout = _layout("seconds", rounds)
    layout |= {"barmode": "stack", "bargap": 0.15}
    layout["xaxis"] |= {"type": "category", "nticks": 12, "title": {"text": "round" if step == 1 else "rounds"}}
    return {"data": data, "layout": layout}


def rounded(value: float | None, digits: int = _DIGITS) -> float | None:
    """A value with no more digits than are drawn; None stays."""
    return None if value is None else round(value, digits)


def _nothing() -> dict[str, Any]:
    """Instead of axes that a chart without a value would make up."""
    place = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    hidden = {"visible": False}
    text = {"text": "nothing measured", "showarrow": False, **place}
    return {"xaxis": dict(hidden), "yaxis": dict(hidden), "annotations": [text]}


def _layout(title: str, rounds: Sequence[int], *, unit: bool = False) -> dict[str, Any]:
    xaxis: dict[str, Any] = {"title": {"text": "round"}, "tickformat": "d"}
    if max(rounds, default=0) - min(rounds, default=0) <= FEW_ROUNDS:
        xaxis |= {"dtick": 1}  # else there are ticks at halves, and each number stands there twice
    yaxis: dict[str, Any] = {"title": {"text": title}}
    if unit:
        yaxis |= {"rangemode": "normal", "tickformat": ".2f"}
    return {"xaxis": xaxis, "yaxis": yaxis}
