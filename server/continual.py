"""A study that goes on from a published model: what it gained on new images, and what it forgot of the old ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.study import Study
from common.wire.tensors import Array

if TYPE_CHECKING:
    from rich.table import Table

    from server.evaluation import HoldoutResult
    from server.results import Evaluated
    from server.starting import Start

HOLDOUTS = ("new", "old")


def compare(
    study: Study,
    start: Start,
    weights: Sequence[Array],
    new: Evaluated | None,
    old: Evaluated | None,
    measured: HoldoutResult | None = None,
) -> dict[str, Any]:
    """Dice before (of the weights that the study started from) and after it (of `weights`), by holdout.

    Each model prepares images as its own study says, so that "before" is what users of the old model had.

    Parameters
    ----------
    new, old : the study's own holdout, and that of the study before; None where it is not given.
    measured : the result of `weights` on the new holdout, where it is known already.

    Returns
    -------
    dict
        "new", "old" where given: "cases", "before", "after" (mean Dice over the cases) and "class", the same of every
        foreground class. "forgetting": before - after on the old holdout, below 0 where the new study helped there too;
        None without one. Figures that do not exist are NaN.
    """
    result: dict[str, Any] = {}
    for name, evaluated in zip(HOLDOUTS, (new, old), strict=True):
        if evaluated is not None:
            before = _as_before(study, start, evaluated).evaluate(start.weights)
            after = measured if name == "new" and measured is not None else evaluated.evaluate(weights)
            result[name] = _change(before, after)
    known = result.get("old")
    result["forgetting"] = known["before"] - known["after"] if known else None
    return result


def _as_before(study: Study, start: Start, evaluated: Evaluated) -> Evaluated:
    """The holdout as the study before prepares it; its sites' names are those of this study."""
    from server.results import Evaluated

    before = start.study
    assert before is not None, "an encoder's weights are no model"
    ways = [(one.preprocessing, one.publishing.tile, one.evaluation.overlap, one.evaluation.mirror)
            for one in (study, before)]  # fmt: skip
    if ways[0] == ways[1]:
        return Evaluated(study, evaluated.folder, evaluated.holdout)
    return Evaluated(dataclasses.replace(before, cohort=study.cohort), evaluated.folder)


def _change(before: HoldoutResult, after: HoldoutResult) -> dict[str, Any]:
    classes = {
        name: {"before": before.dice_of_classes[name], "after": after.dice_of_classes[name]} for name in after.classes
    }
    return {"cases": len(after.cases), "before": before.mean_dice, "after": after.mean_dice, "class": classes}


def rows_of(comparison: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """A row a holdout, then a class where there are several: what, cases, Dice before, after, and the change."""
    rows = []
    for name in HOLDOUTS:
        if found := comparison.get(name):
            rows.append((f"{name} holdout", str(found["cases"]), *_figures(found)))
            if len(found["class"]) > 1:
                rows += [(f"  {title}", "", *_figures(values)) for title, values in found["class"].items()]
    return rows


def _figures(values: Mapping[str, float | None]) -> tuple[str, str, str]:
    """Before, after and the change; "-" for what does not exist (None in a report, NaN before it is one)."""
    before, after = (math.nan if values[key] is None else float(values[key] or 0.0) for key in ("before", "after"))
    return _shown(before, ".4f"), _shown(after, ".4f"), _shown(after - before, "+.4f")


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def continual_table(comparison: Mapping[str, Any]) -> Table:
    """The comparison of a report as a table for the terminal."""
    from rich.table import Table

    forgetting = comparison.get("forgetting")
    caption = None if forgetting is None else f"forgetting {forgetting:+.4f} (before - after on the old holdout)"
    table = Table(title="Before and after the study", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("Dice")
    for heading in ("cases", "before", "after", "change"):
        table.add_column(heading, justify="right")
    for row in rows_of(comparison):
        table.add_row(*row)
    return table


def card_section(details: Mapping[str, Any]) -> list[str]:
    """Paragraphs for the model card, with a heading: what the study started from, and what that changed."""
    parts = []
    if origin := details.get("started_from"):
        parts.append(
            f"Training started from the weights of {origin['study']} {origin['version']} (SHA-256 "
            f"{origin['sha256'][:16]}…)."
        )
    if origin := details.get("encoder_weights"):
        parts.append(f"The encoder started from weights of a file (SHA-256 {origin['sha256'][:16]}…).")
    if comparison := details.get("continual"):
        lines = ["| Dice | images | before | after | change |", "|---|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows_of(comparison)]
        parts.append("\n".join(lines))
        if comparison.get("forgetting") is not None:
            parts.append(
                "The old holdout is that of the study before. Forgetting, Dice before minus after on it: "
                f"{_shown(float(comparison['forgetting']), '+.4f')}."
            )
    return ["## Start", *parts] if parts else []
