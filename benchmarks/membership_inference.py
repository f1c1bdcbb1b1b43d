"""Can somebody with the model tell which images it was trained on, with and without privacy?

The images of one site are divided at random into members, which a model is trained on, and others, which it never sees.
The attack is that of Yeom et al. 2018 (arXiv:1709.01604): an image of small loss is taken for a member. It knows the
label and needs nothing but the model. Reported are

    AUC        the chance that a member's loss is below another image's; 0.5 is guessing
    advantage  the largest difference, over all thresholds, of true and false positives; 0 is guessing. With few images
               chance alone gives some: its expectation under guessing stands beside it
    gap        the mean loss of the others less that of the members

Arms: without privacy, and patient-level privacy at each of --noise, an image being a patient; the same steps, optimizer
and initial weights. The loss of an image is that of --crops-tried patches cut from it, the same in every arm. Epsilon
is that of the members after all steps, at --delta. It bounds the advantage of *every* attack: at most (e^epsilon - 1 +
2 delta) / (e^epsilon + 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._federated import federate
from benchmarks._pooled import ROOT, Data, Image, Label, Row, read_rows, shipped_study, write_between
from benchmarks._private import epsilon_after, noise_levels, private_study
from benchmarks._report import report
from common.errors import DataError
from common.imaging.patches import sample_patch
from common.learning.runtime import configure_tensorflow
from common.study import Study

_DOCS = ROOT / "docs" / "privacy.md"
_NAME = "membership_inference"
_SHOWN = {
    "site": "site",
    "arm": "noise",
    "epsilon": "epsilon",
    "members": "members",
    "steps": "steps",
    "auc": "AUC",
    "auc_error": "+-",
    "advantage": "advantage",
    "advantage_of_guessing": "by guessing",
    "gap": "gap",
}
Losses = npt.NDArray[np.float64]


def main() -> None:
    """Trains the arms asked for and attacks them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the nuclei's sites and `holdout`")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where the arms' checkpoints are kept")
    parser.add_argument("--site", default="fluo_small", help="whose images (default: fluo_small)")
    parser.add_argument(
        "--noise", nargs="+", metavar="Z", default=["none", "0.5", "1"], help="or none (default: none 0.5 1)"
    )
    parser.add_argument("--members", type=int, metavar="N", help="train on so many images (default: half of them)")
    parser.add_argument("--steps", type=int, default=400, help="(default: 400)")
    parser.add_argument("--patients", type=float, default=8.0, help="images expected in a step (default: 8)")
    parser.add_argument("--clip", type=float, default=1.0, help="clipping norm (default: 1)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam (default: 1e-3)")
    parser.add_argument("--delta", type=float, default=1e-3, help="(default: 1e-3)")
    parser.add_argument("--crops-tried", type=int, default=8, help="patches of an image for its loss (default: 8)")
    parser.add_argument("--filters", type=int, metavar="N", help="of the network (default: the study's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="TensorFlow's threads (default: 2)")
    parser.add_argument("--write-docs", action="store_true", help="only write the table into docs/privacy.md")
    options = parser.parse_args()
    if options.write_docs:
        write_docs()
        return
    if options.data is None or options.weights is None:
        parser.error("--data, --weights: give the folder of the sites and `holdout`, and one to keep checkpoints in")
    if min(options.steps, options.crops_tried, options.threads) < 1:
        parser.error("--steps, --crops-tried, --threads: expected positive numbers")
    study = shipped_study("nuclei")
    if options.site not in study.cohort.sites:
        parser.error(f"--site: expected one of {', '.join(study.cohort.sites)}")
    levels = noise_levels(parser, options.noise)
    configure_tensorflow(options.threads)
    study = _study_of(study, options)
    try:
        data = Data.load(study, options.data)
    except DataError as error:
        parser.error(str(error))
    members, others = _divided(data.training[options.site], options.members, options.seed)
    print(f"{options.site}: {len(members)} members, {len(others)} others", flush=True)
    rows = []
    for arm, noise in levels.items():
        print(f"noise {arm}: {options.steps} steps", flush=True)
        rows.append(measure(data, members, others, arm, noise, options))
    report(_NAME, rows, _SHOWN)


def _study_of(study: Study, options: argparse.Namespace) -> Study:
    client = dataclasses.replace(
        study.training.client_optimizer, learning_rate=options.rate, schedule="constant", warmup_rounds=0
    )
    return dataclasses.replace(
        study,
        seed=options.seed,
        augmentation=(),  # it makes members look like others, and is not what is asked
        model=dataclasses.replace(study.model, filters=options.filters or study.model.filters),
        training=dataclasses.replace(study.training, rounds=1, threads=options.threads, client_optimizer=client),
        cohort=dataclasses.replace(study.cohort, sites=(options.site,), quorum=1),
        evaluation=dataclasses.replace(study.evaluation, validation_fraction=0.0),
    )


def _divided(
    cases: Sequence[tuple[Image, Label]], members: int | None, seed: int
) -> tuple[list[tuple[Image, Label]], list[tuple[Image, Label]]]:
    """Members and as many others, at random."""
    order = np.random.default_rng(seed).permutation(len(cases))
    count = min(members or len(cases) // 2, len(cases) // 2)
    return [cases[place] for place in order[:count]], [cases[place] for place in order[count : 2 * count]]


def measure(
    data: Data,
    members: Sequence[tuple[Image, Label]],
    others: Sequence[tuple[Image, Label]],
    arm: str,
    noise: float | None,
    options: argparse.Namespace,
) -> Row:
    """Train on the members and tell them from the others."""
    from common.models import build_network

    study = private_study(
        data.study,
        noise,
        patients=options.patients,
        crops=1,
        steps=options.steps,
        norm=options.clip,
        delta=options.delta,
    )
    own = dataclasses.replace(data, study=study, training={options.site: list(members)})
    settings = (options.steps, options.patients, options.clip, options.rate, study.model.filters, options.seed)
    key = "-".join(f"{value:g}" for value in (len(members), *settings))
    folder: Path = options.weights / f"membership-{options.site}-{arm}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    weights = federate(own, options.steps, options.seed, folder, [1])[1]
    seconds = time.perf_counter() - started
    network = build_network(study)
    known, unknown = (
        losses(study, network, weights, cases, options.crops_tried, options.seed) for cases in (members, others)
    )
    return {
        "site": options.site,
        "arm": arm,
        "epsilon": round(epsilon_after(study, len(members), options.steps), 4) if noise is not None else math.inf,
        "delta": options.delta,
        "members": len(members),
        "others": len(others),
        "steps": options.steps,
        "patients_per_step": options.patients,
        "clip_norm": options.clip,
        "filters": study.model.filters,
        "seed": options.seed,
        "auc": round(auc(known, unknown), 4),
        "auc_error": round(math.sqrt((len(known) + len(unknown) + 1) / (12 * len(known) * len(unknown))), 4),
        "advantage": round(advantage(known, unknown), 4),
        "advantage_of_guessing": round(guessing(len(known), len(unknown)), 4),
        "gap": round(float(unknown.mean() - known.mean()), 5),
        "loss_of_members": round(float(known.mean()), 5),
        "seconds": round(seconds, 1),
    }


def losses(
    study: Study, network: Any, weights: Any, cases: Sequence[tuple[Image, Label]], crops: int, seed: int
) -> Losses:
    """The loss of each image, over patches whose places follow from the seed and the image's place alone."""
    import tensorflow as tf

    from common.metrics.losses import dice_cross_entropy

    constants = [tf.constant(weight) for weight in weights]

    @tf.function(autograph=False)
    def loss(images: Any, labels: Any) -> Any:
        return dice_cross_entropy(network(constants, images), labels, head=study.model.head)

    found = []
    for place, (image, label) in enumerate(cases):
        rng = np.random.default_rng([seed, place])
        patch, share = study.preprocessing.patch, study.training.foreground_fraction
        pairs = [sample_patch(image, label, patch, rng, share) for _ in range(crops)]
        found.append(float(loss(*(np.stack(part) for part in zip(*pairs, strict=True)))))
    return np.array(found)


def auc(members: Losses, others: Losses) -> float:
    """The chance that a member's loss is below another image's; ties count half."""
    below = (members[:, np.newaxis] < others).mean()
    return float(below + (members[:, np.newaxis] == others).mean() / 2)


def advantage(members: Losses, others: Losses) -> float:
    """The largest share of members less the share of others at or below a threshold."""
    thresholds = np.concatenate([members, others])[:, np.newaxis]
    return float(max(0.0, ((members <= thresholds).mean(1) - (others <= thresholds).mean(1)).max()))


def guessing(members: int, others: int, draws: int = 2000) -> float:
    """The mean advantage where losses say nothing."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        values = rng.random(members + others)
        found.append(advantage(values[:members], values[members:]))
    return float(np.mean(found))


def write_docs() -> None:
    """Put the table between the marks in docs/privacy.md."""
    text = frozenset(["site", "arm"])
    rows = read_rows(_NAME, text, frozenset(["members", "others", "steps", "filters", "seed"]))
    if not rows:
        raise SystemExit("no rows; run the benchmark first")
    begin, end = f"<!-- {_NAME}: begin -->\n", f"<!-- {_NAME}: end -->\n"
    write_between(_DOCS, begin, end, table(rows))


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row an arm."""
    first = rows[0]
    lines = [
        "",
        f"{first['members']} images of {first['site']} trained on for {first['steps']} steps, {first['others']} others "
        f"never seen; delta {float(first['delta']):g}, {first['filters']} filters.",
        "",
        "| noise | epsilon | AUC (0.5 is guessing) | advantage | advantage by guessing | gap of the losses |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        title = "no privacy" if row["arm"] == "none" else row["arm"]
        epsilon = float(row["epsilon"])
        lines.append(
            f"| {title} | {'no bound' if math.isinf(epsilon) else f'{epsilon:.1f}'} | {float(row['auc']):.3f} +- "
            f"{float(row['auc_error']):.3f} | {float(row['advantage']):.3f} | "
            f"{float(row['advantage_of_guessing']):.3f} | {float(row['gap']):+.4f} |"
        )
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    main()
