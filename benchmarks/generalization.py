"""What does each hospital gain by taking part, and what is lost against pooling all images?

Arms, all from the same initial weights, with the same optimizer, cosine schedule and augmentations, on patches drawn
in the same way:

    alone SITE   trained on the images of one site
    pooled       trained on the images of all sites in one place, patches drawn equally from them: the ceiling
    fedavg       the study's own plan (`common.learning`), sites side by side in this process, no network between them
    fedprox      the same with the proximal term of --mu

Budget: every arm takes the same number of gradient steps, --steps, counted over all its sites. Pooled, and each site
alone, take them one after the other; in a federation of n sites each takes 1/n of them, in --rounds rounds, so that its
longest chain of steps is n times shorter, as its time on n machines would be. "Patches of each" is how many patches of
a site's images an arm saw: n times as many for a site alone as for pooled and federated training.

Every arm keeps its weights after 1/2, 3/4 and all of its steps; validation cases (the split that sites make of the
study) choose one of the three: the site's own for a site alone, those of all sites, each site counting the same, for
pooled and federated. The holdout only reports: mean Dice of every arm on every site's holdout cases.

    gain      the mean of federated over sites, relative to the mean over the sites alone of the same figure
    ceiling   the same mean of federated as a share of pooled's

Both are of two means: over the sites with at least 10 holdout cases, and over all sites.

Rows that `results/generalization_STUDY.csv` already has (of the same arm, steps, rounds, filters, seed and, of fedprox,
mu) are not computed again, and an arm that was interrupted goes on from its last checkpoint in --weights.
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

from benchmarks._federated import Weights, checkpoint, checkpoint_path, fastest_operations, federate, snapshot
from benchmarks._pooled import (
    ROOT,
    Data,
    Labelled,
    Row,
    Trainer,
    batches,
    dice_by_case,
    mean_of_sites,
    read_rows,
    shipped_study,
    write_between,
)
from benchmarks._report import report
from common.errors import DataError
from common.learning.runtime import configure_tensorflow
from common.study import Study
from common.wire.tensors import read_tensors, write_tensors

LARGE_SITE_CASES = 10
FEDERATED = ("fedavg", "fedprox")
_DOCS = ROOT / "docs" / "generalization.md"
_STUDIES = ("nuclei", "hippocampus")
_SNAPSHOTS = (0.5, 0.75, 1.0)
_MEANS = {"holdout_large": f"sites of >= {LARGE_SITE_CASES}", "holdout_sites": "all sites"}
_TEXT = frozenset(["arm"])
_WHOLE = frozenset(["steps", "rounds", "filters", "seed", "chosen_step", "patches_of_each_source"])
_BUDGET = ("steps", "filters", "seed")
_IDENTITY = ("arm", *_BUDGET, "rounds", "mu")


def main() -> None:
    """Trains and evaluates the arms asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=_STUDIES, default="nuclei", help="(default: nuclei)")
    parser.add_argument("--data", type=Path, help="the folder of the study's sites and `holdout`")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where the arms' weights and checkpoints are kept")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help='some of the arms, such as "alone fluo_small"')
    parser.add_argument("--steps", type=int, default=1600, help="gradient steps of each arm (default: 1600)")
    parser.add_argument("--rounds", type=int, default=16, help="of the federated arms (default: 16)")
    parser.add_argument("--mu", type=float, default=0.01, help="of FedProx (default: 0.01)")
    parser.add_argument("--filters", type=int, metavar="N", help="of the network (default: the study's)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, patches, augmentations (default: 0)")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads (default: 2)")
    parser.add_argument("--write-docs", action="store_true", help="only write the tables into docs/generalization.md")
    options = parser.parse_args()
    if options.write_docs:
        write_docs()
        return
    study = _study_of(options)
    sites = study.cohort.sites
    if options.data is None or options.weights is None:
        parser.error("--data, --weights: give the folder of the sites and `holdout`, and one to keep weights in")
    if min(options.steps, options.rounds, options.every, options.threads) < 1:
        parser.error("--steps, --rounds, --every, --threads: expected positive numbers")
    if options.steps % (options.rounds * len(sites)):
        parser.error(
            f"--steps: expected a multiple of {options.rounds} rounds x {len(sites)} sites, so that every arm takes as "
            "many; change one of them"
        )
    arms = [*(f"alone {site}" for site in sites), "pooled", *FEDERATED]
    if unknown := set(options.arms or ()) - set(arms):
        parser.error(f"--arms: {', '.join(sorted(unknown))} not known; choose of {', '.join(arms)}")
    name = f"generalization_{options.study}"
    identities = {arm: _identity(arm, study.model.filters, options) for arm in arms}
    missing = [arm for arm in options.arms or arms if identities[arm] not in map(_identity_of, _rows(name))]
    if not missing:
        summarize([row for row in _rows(name) if _identity_of(row) in identities.values()])
        return
    configure_tensorflow(options.threads)
    try:
        data = Data.load(study, options.data)
    except DataError as error:
        parser.error(str(error))
    options.weights.mkdir(parents=True, exist_ok=True)
    for arm in missing:
        print(f"{arm}: {options.steps} steps", flush=True)
        row = identities[arm] | measure(data, arm, options)
        report(name, [*_rows(name), row], _shown(sites))
    summarize([row for row in _rows(name) if _identity_of(row) in identities.values()])


def _identity(arm: str, filters: int, options: argparse.Namespace) -> Row:
    """What a row and a checkpoint must agree in to be of the same training; without a proximal term mu is 0."""
    values = (arm, options.steps, filters, options.seed, options.rounds, options.mu if arm == "fedprox" else 0.0)
    return dict(zip(_IDENTITY, values, strict=True))


def _identity_of(row: Mapping[str, Any]) -> Row:
    return {key: row[key] for key in _IDENTITY}


def _study_of(options: argparse.Namespace) -> Study:
    study = shipped_study(options.study)
    model = dataclasses.replace(study.model, filters=options.filters or study.model.filters)
    client = dataclasses.replace(study.training.client_optimizer, schedule="cosine", warmup_rounds=0)
    training = dataclasses.replace(
        study.training, rounds=options.rounds, threads=options.threads, client_optimizer=client
    )
    return dataclasses.replace(study, seed=options.seed, model=model, training=training)


# One arm. ----------------------------------------------------------------------------------------------------------


def measure(data: Data, arm: str, options: argparse.Namespace) -> Row:
    """Train an arm, choose among its snapshots, and evaluate the chosen one on everybody's holdout."""
    from common.models import build_network

    study, sites = data.study, sorted(data.training)
    network = build_network(study)
    key = (
        f"{options.study}-{arm.replace(' ', '-')}-{options.steps}-{options.rounds}-{study.model.filters}-{options.seed}"
    )
    folder: Path = options.weights / (f"{key}-{options.mu:g}" if arm == "fedprox" else key)
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    if arm in FEDERATED:
        snapshots = _federated(data, arm, options, folder)
        sources = len(sites)
    else:
        site = arm.removeprefix("alone ")
        own = data if arm == "pooled" else dataclasses.replace(data, training={site: data.training[site]})
        snapshots = _together(own, network, options, folder)
        sources = len(own.training)
    seconds = time.perf_counter() - started
    judges = [case for case in data.validation if arm in ("pooled", *FEDERATED) or arm == f"alone {case.site}"]
    scores = {step: _mean(study, network, weights, judges, options.threads) for step, weights in snapshots.items()}
    chosen = max(scores, key=lambda step: (-1.0 if math.isnan(scores[step]) else scores[step], step))
    dice = dice_by_case(study, network, snapshots[chosen], data.holdout, options.threads)
    row: Row = {
        "chosen_step": chosen,
        "patches_of_each_source": options.steps * study.training.batch_size // sources,
        "validation": round(scores[chosen], 4),
    }
    for site in sites:
        found = [value for number, value in dice.items() if data.holdout[number].site == site]
        row[f"holdout_{site}"] = round(float(np.mean(found)), 4) if found else math.nan
        row[f"cases_{site}"] = len(found)
    return row | {
        "holdout_sites": round(mean_of_sites(data.holdout, dice), 4),
        "holdout_large": round(_large(row, sites), 4),
        "seconds": round(seconds, 1),
    }


def _large(row: Mapping[str, Any], sites: Sequence[str]) -> float:
    """The mean over the sites with enough holdout cases; NaN if there are none."""
    found = [float(row[f"holdout_{site}"]) for site in sites if int(row[f"cases_{site}"]) >= LARGE_SITE_CASES]
    return float(np.mean(found)) if found else math.nan


def _together(data: Data, network: Any, options: argparse.Namespace, folder: Path) -> dict[int, Weights]:
    """The snapshots of training on all of `data` in one place, by step."""
    study, steps = data.study, options.steps
    rate = study.training.client_optimizer.learning_rate
    trainer = Trainer(study, network, steps, options.seed, fastest_operations(study), rate)
    if (state := checkpoint(folder)) is not None:
        trainer.restore(state)
        print(f"going on after step {trainer.done}", flush=True)
    losses = []
    for images, labels in batches(data, study.augmentation, steps, options.seed, trainer.done):
        losses.append(trainer.step(images, labels))
        if trainer.done in _snapshot_points(steps):
            write_tensors(snapshot(folder, trainer.done), trainer.weights())
        if trainer.done % options.every == 0 or trainer.done == steps:
            write_tensors(checkpoint_path(folder), [np.asarray(value) for value in trainer.state()])
            print(f"step {trainer.done} of {steps}: loss {np.mean([float(loss) for loss in losses]):.3f}", flush=True)
            losses.clear()
    return {step: read_tensors(snapshot(folder, step)) for step in _snapshot_points(steps)}


def _federated(data: Data, arm: str, options: argparse.Namespace, folder: Path) -> dict[int, Weights]:
    """The snapshots of a federation's rounds, by the steps that all sites took until then."""
    mu = options.mu if arm == "fedprox" else 0.0
    training = dataclasses.replace(data.study.training, algorithm=arm, proximal_mu=mu)
    federation = dataclasses.replace(data, study=dataclasses.replace(data.study, training=training))
    local = options.steps // (options.rounds * len(data.training))
    kept = federate(federation, local, options.seed, folder, _snapshot_points(options.rounds))
    return {number * local * len(data.training): weights for number, weights in kept.items()}


def _snapshot_points(count: int) -> list[int]:
    """After which of so many steps, or rounds, weights are kept."""
    return [math.ceil(share * count) for share in _SNAPSHOTS]


# Evaluation. -------------------------------------------------------------------------------------------------------


def _mean(study: Study, network: Any, weights: Weights, cases: Sequence[Labelled], threads: int) -> float:
    dice = dice_by_case(study, network, weights, cases, threads)
    return mean_of_sites(cases, dice) if dice else math.nan


# The rows. ---------------------------------------------------------------------------------------------------------


def _rows(name: str) -> list[Row]:
    rows = read_rows(name, _TEXT, _WHOLE)
    return [{key: int(value) if key.startswith("cases_") else value for key, value in row.items()} for row in rows]


def _shown(sites: Sequence[str]) -> dict[str, str]:
    shown = {"arm": "arm", "steps": "steps", "patches_of_each_source": "patches of each", "chosen_step": "chosen"}
    shown |= {"validation": "validation"} | {f"holdout_{site}": site for site in sites}
    return shown | {"holdout_large": f">= {LARGE_SITE_CASES} cases", "holdout_sites": "all sites", "seconds": "s"}


def gains(rows: Sequence[Row], column: str) -> dict[str, float]:
    """Figures over arms of one budget: the mean of the sites alone; each federated arm's gain, and share of pooled.

    `column` is the mean that they are of: "holdout_large", over sites with enough holdout cases, or "holdout_sites".
    """
    found = {_title(row): float(row[column]) for row in rows}
    alone = [value for arm, value in found.items() if arm.startswith("alone ")]
    figures: dict[str, float] = {}
    if alone:
        figures["alone"] = float(np.mean(alone))
    for row in rows:
        if row["arm"] in FEDERATED:
            arm = _title(row)
            if alone:
                figures[f"{arm} gain"] = found[arm] / figures["alone"] - 1.0
            if "pooled" in found:
                figures[f"{arm} of pooled"] = found[arm] / found["pooled"]
    return figures


def _title(row: Row) -> str:
    """What tells arms of one budget apart: those that are not federated have no rounds."""
    arm = str(row["arm"])
    if arm not in FEDERATED:
        return arm
    proximal = f", mu {float(row['mu']):g}" if arm == "fedprox" else ""
    return f"{arm}{proximal}, {row['rounds']} rounds"


def summarize(rows: Sequence[Row]) -> None:
    """Print what the arms say together."""
    for column, name in _MEANS.items():
        print(f"mean over {name}:")
        for figure, value in gains(rows, column).items():
            form = "+.1%" if figure.endswith("gain") else ".1%" if figure.endswith("pooled") else ".4f"
            print(f"  {figure}: {value:{form}}")


def write_docs() -> None:
    """Put a table of each budget that was run between the study's marks in docs/generalization.md."""
    for study in _STUDIES:
        budgets: dict[tuple[Any, ...], list[Row]] = {}
        for row in _rows(f"generalization_{study}"):
            budgets.setdefault(tuple(row[key] for key in _BUDGET), []).append(row)
        if budgets:
            tables = "".join(table(rows) for _, rows in sorted(budgets.items()))
            write_between(_DOCS, f"<!-- {study}: begin -->\n", f"<!-- {study}: end -->\n", tables)


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row an arm, a column a site, and what follows from them."""
    newest = {_title(row): row for row in rows}.values()
    order = ["alone", "pooled", *FEDERATED]
    chosen = sorted(
        newest, key=lambda row: (order.index(str(row["arm"]).split()[0]), row["mu"], row["rounds"], row["arm"])
    )
    sites = [key.removeprefix("holdout_") for key in chosen[0] if key.startswith("holdout_")][:-2]
    heading = ["", *(f"{site} (n={chosen[0][f'cases_{site}']})" for site in sites)]
    heading += [*_MEANS.values(), "patches of each source", "best after step", "seconds"]
    first = chosen[0]
    lines = [
        "",
        f"{first['steps']} gradient steps an arm, {first['filters']} filters:",
        "",
        f"| {' | '.join(heading)} |",
        "|---|" + "---:|" * (len(heading) - 1),
    ]
    for row in chosen:
        cells = [f"{float(row[f'holdout_{site}']):.3f}" for site in sites]
        cells += [f"{float(row['holdout_large']):.3f}", f"{float(row['holdout_sites']):.3f}"]
        cells += [f"{row['patches_of_each_source']}", f"{row['chosen_step']}", f"{float(row['seconds']):.0f}"]
        lines.append(f"| {_title(row)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_together_lines(chosen), "", ""])


def _together_lines(rows: Sequence[Row]) -> list[str]:
    """Markdown: a row a federated arm, its gain and its share of pooled, by either mean over sites."""
    figures = {name: gains(rows, column) for column, name in _MEANS.items()}
    arms = [_title(row) for row in rows if row["arm"] in FEDERATED]
    columns = []
    for name, found in figures.items():
        alone = f"against the sites alone ({found.get('alone', math.nan):.3f}), {name}"
        for kind, title, form in (("gain", alone, "+.1%"), ("of pooled", f"of pooled, {name}", ".1%")):
            if any(math.isfinite(found.get(f"{arm} {kind}", math.nan)) for arm in arms):
                columns.append((title, found, kind, form))
    if not columns:
        return []
    lines = [f"|  | {' | '.join(title for title, *_ in columns)} |", "|---|" + "---:|" * len(columns)]
    for arm in arms:
        cells = [format(found[f"{arm} {kind}"], form) for _, found, kind, form in columns]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
