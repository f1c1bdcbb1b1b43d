"""What does patient-level privacy cost in Dice?

Arms of the nuclei study, federated in this process (`benchmarks._federated`), all from the same initial weights with
the same optimizer and number of steps, every site counting the same:

    none       no privacy; a batch has as many patches as a private step expects
    0          each image's gradient is clipped, without noise: what clipping alone costs (epsilon is infinite)
    Z          clipped, with noise of Z times the clipping norm

All sites go through all rounds, whatever they spend. Each image counts as a patient. Epsilon is that of each site at
the end, at --delta; a site with fewer images spends more. The holdout reports; the weights are those of the last round,
as validation is not private.

How to read it: a row an arm; "epsilon" is the largest and the smallest of the sites', Dice is the mean over the sites'
holdout images. Rows that `results/privacy.csv` has already, of the same settings, are not computed again, and an arm
that was interrupted goes on from its last round in --weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._federated import federate
from benchmarks._pooled import (
    ROOT,
    Data,
    Row,
    dice_by_case,
    mean_of_sites,
    read_rows,
    shipped_study,
    write_between,
)
from benchmarks._private import epsilon_after, noise_levels, private_study
from benchmarks._report import report
from common.errors import DataError
from common.learning.runtime import configure_tensorflow
from common.study import Study

_DOCS = ROOT / "docs" / "privacy.md"
_NAME = "privacy"
_TEXT = frozenset(["arm"])
_WHOLE = frozenset(["steps", "rounds", "crops", "filters", "seed"])
_IDENTITY = ("arm", "steps", "rounds", "patients_per_step", "crops", "clip_norm", "rate", "delta", "filters", "seed")
_SHOWN = {"arm": "noise", "epsilon_most": "epsilon, most", "epsilon_least": "least", "steps": "steps"}
_SHOWN |= {"validation": "validation", "holdout_sites": "holdout Dice", "seconds": "s"}


def main() -> None:
    """Trains and evaluates the arms asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the nuclei's sites and `holdout`")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where the arms' weights and checkpoints are kept")
    parser.add_argument(
        "--noise",
        nargs="+",
        metavar="Z",
        default=["none", "0", "0.5", "1", "2"],
        help="noise multipliers, or none (default: none 0 0.5 1 2)",
    )
    parser.add_argument("--steps", type=int, default=420, help="steps of each site (default: 420)")
    parser.add_argument("--rounds", type=int, default=14, help="(default: 14)")
    parser.add_argument("--patients", type=float, default=8.0, help="images expected in a step (default: 8)")
    parser.add_argument("--crops", type=int, default=1, help="patches of an image in a step (default: 1)")
    parser.add_argument("--clip", type=float, default=1.0, help="clipping norm (default: 1)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam at the sites (default: 1e-3)")
    parser.add_argument("--delta", type=float, default=1 / 2590, help="(default: 1/2590)")
    parser.add_argument("--filters", type=int, metavar="N", help="of the network (default: the study's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads (default: 2)")
    parser.add_argument("--write-docs", action="store_true", help="only write the table into docs/privacy.md")
    options = parser.parse_args()
    if options.write_docs:
        write_docs()
        return
    if options.data is None or options.weights is None:
        parser.error("--data, --weights: give the folder of the sites and `holdout`, and one to keep weights in")
    if min(options.steps, options.rounds, options.crops, options.threads) < 1 or options.steps % options.rounds:
        parser.error("--steps, --rounds, --crops, --threads: expected positive numbers, and steps a multiple of rounds")
    levels = noise_levels(parser, options.noise)
    base = _base(options)
    identities = {arm: _identity(arm, base, options) for arm in levels}
    known = [_identity_of(row) for row in _rows()]
    missing = [arm for arm in levels if identities[arm] not in known]
    if not missing:
        report(_NAME, _rows(), _SHOWN)
        return
    configure_tensorflow(options.threads)
    try:
        data = Data.load(base, options.data)
    except DataError as error:
        parser.error(str(error))
    for arm in missing:
        print(f"noise {arm}: {options.steps} steps a site", flush=True)
        row = identities[arm] | measure(data, arm, levels[arm], options)
        report(_NAME, [*_rows(), row], _SHOWN)


def _base(options: argparse.Namespace) -> Study:
    study = shipped_study("nuclei")
    model = dataclasses.replace(study.model, filters=options.filters or study.model.filters)
    client = dataclasses.replace(
        study.training.client_optimizer, learning_rate=options.rate, schedule="cosine", warmup_rounds=0
    )
    training = dataclasses.replace(
        study.training, rounds=options.rounds, threads=options.threads, client_optimizer=client
    )
    return dataclasses.replace(study, seed=options.seed, model=model, training=training)


def _identity(arm: str, study: Study, options: argparse.Namespace) -> Row:
    values = (arm, options.steps, options.rounds, options.patients, options.crops, options.clip, options.rate)
    return dict(zip(_IDENTITY, (*values, round(options.delta, 9), study.model.filters, options.seed), strict=True))


def _identity_of(row: Mapping[str, Any]) -> Row:
    return {key: row[key] for key in _IDENTITY}


def measure(data: Data, arm: str, noise: float | None, options: argparse.Namespace) -> Row:
    """Train an arm and evaluate its last round."""
    from common.models import build_network

    local = options.steps // options.rounds
    study = private_study(
        data.study,
        noise,
        patients=options.patients,
        crops=options.crops,
        steps=local,
        norm=options.clip,
        delta=options.delta,
    )
    private = dataclasses.replace(data, study=study)
    parts = (arm, *(f"{value:g}" for value in _identity(arm, study, options).values() if not isinstance(value, str)))
    folder: Path = options.weights / "-".join(("privacy", *parts))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    weights = federate(private, local, options.seed, folder, [options.rounds])[options.rounds]
    seconds = time.perf_counter() - started
    network = build_network(study)
    spent = {
        site: epsilon_after(study, len(cases), options.steps) if noise is not None else math.inf
        for site, cases in data.training.items()
    }
    dice = dice_by_case(study, network, weights, data.holdout, options.threads)
    validation = dice_by_case(study, network, weights, data.validation, options.threads)
    row: Row = {
        "epsilon_most": round(max(spent.values()), 4),
        "epsilon_least": round(min(spent.values()), 4),
        "validation": round(mean_of_sites(data.validation, validation), 4) if validation else math.nan,
        "holdout_sites": round(mean_of_sites(data.holdout, dice), 4) if dice else math.nan,
    }
    for site in sorted(data.training):
        found = [value for number, value in dice.items() if data.holdout[number].site == site]
        row[f"images_{site}"] = float(len(data.training[site]))
        row[f"epsilon_{site}"] = round(spent[site], 4)
        row[f"holdout_{site}"] = round(float(np.mean(found)), 4) if found else math.nan
    return row | {"seconds": round(seconds, 1)}


def _rows() -> list[Row]:
    return read_rows(_NAME, _TEXT, _WHOLE)


def write_docs() -> None:
    """Put the table between the marks in docs/privacy.md."""
    rows = _rows()
    if not rows:
        raise SystemExit("no rows; run the benchmark first")
    write_between(_DOCS, "<!-- privacy: begin -->\n", "<!-- privacy: end -->\n", table(rows))


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row an arm, a column a site with its epsilon and holdout Dice."""
    first = rows[0]
    sites = [key.removeprefix("images_") for key in first if key.startswith("images_")]
    heading = ["noise", *(f"{site} (n={float(first[f'images_{site}']):.0f})" for site in sites), "all sites"]
    lines = [
        "",
        f"Holdout Dice (epsilon in brackets) of nuclei, an image being a patient, after {first['steps']} steps of "
        f"{float(first['patients_per_step']):g} expected images at each site; clipping norm {first['clip_norm']:g}, "
        f"delta {float(first['delta']):.2g}, {first['filters']} filters.",
        "",
        f"| {' | '.join(heading)} |",
        "|---|" + "---:|" * (len(heading) - 1),
    ]
    for row in rows:
        cells = [f"{float(row[f'holdout_{site}']):.3f} ({_epsilon(row[f'epsilon_{site}'])})" for site in sites]
        title = "no privacy" if row["arm"] == "none" else row["arm"]
        lines.append(f"| {title} | {' | '.join(cells)} | {float(row['holdout_sites']):.3f} |")
    return "\n".join([*lines, "", ""])


def _epsilon(value: Any) -> str:
    return "no bound" if math.isinf(float(value)) else f"{float(value):.1f}"


if __name__ == "__main__":
    main()
