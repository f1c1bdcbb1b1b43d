"""A federation in this process: the study's own plan over sites side by side, no network between them, resumable.

What comparisons of federated training share. Each site takes so many gradient steps a round on augmented patches of its
own images, whose order and places follow from the seed and the site's place among the names alone. After every round
the coordinator's state lies in the arm's folder, and an arm that was interrupted goes on from there to the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _private
from benchmarks._pooled import Data, batches
from common.errors import WireError
from common.study import Study
from common.wire.tensors import read_tensors, write_tensors

Weights = list[Any]


def fastest_operations(study: Study) -> Any:
    """As a site computes that may choose: in bfloat16 where that is faster, the same in every arm."""
    from common.models import operations_for

    automatic = dataclasses.replace(study.training, precision="auto")
    return operations_for(dataclasses.replace(study, training=automatic))


def federate(data: Data, local: int, seed: int, folder: Path, kept: Collection[int]) -> dict[int, Weights]:
    """The global model's weights after the rounds `kept`, by round.

    Parameters
    ----------
    data : with the study to train; all of its sites take part in all of its rounds. With patient-level privacy each
        image counts as a patient.
    local : gradient steps of each site in a round.
    seed : of patches and augmentations; the initial weights follow from the study's.
    folder : of this arm alone.

    Raises
    ------
    SystemExit : the checkpoint in the folder cannot be read.
    """
    import tensorflow as tf

    from common.learning.graph import leaf_types, to_numpy
    from common.learning.plan import RoundPlan
    from common.learning.process import build_training_process
    from common.models import build_network

    study = data.study
    rounds = study.training.rounds
    plan = RoundPlan(build_training_process(study, fastest_operations(study)))
    state_leaves, weights_leaves = len(leaf_types(plan.state_type)), len(build_network(study).specs)
    sites = sorted(data.training)
    state: list[Any] = plan.initialize()
    done = 0
    if (found := checkpoint(folder)) is not None:
        state, done = found[:-1], int(found[-1])
        print(f"going on after round {done}", flush=True)
    private = study.privacy.unit == "patient"

    def stream(site: str, number: int) -> Iterator[Any]:
        own_seed = 1000 * seed + number  # each site has one of its own
        if private:
            return _private.private_steps(study, data.training[site], rounds * local, own_seed, done * local)
        own = dataclasses.replace(data, training={site: data.training[site]})
        return iter(batches(own, study.augmentation, rounds * local, own_seed, done * local))

    streams = {site: stream(site, number) for number, site in enumerate(sites)}
    element = (
        _private.element(study)
        if private
        else (
            tf.TensorSpec([None, *study.preprocessing.patch, study.task.channels], tf.float32),
            tf.TensorSpec([None, *study.preprocessing.patch], tf.uint8),
        )
    )
    for number in range(done + 1, rounds + 1):
        broadcast = to_numpy(plan.prepare(*state))
        total = plan.zero()
        for site in sites:
            drawn = [next(streams[site]) for _ in range(local)]
            dataset = tf.data.Dataset.from_generator(lambda drawn=drawn: iter(drawn), output_signature=element)
            plan.accumulate(total, plan.work(dataset, broadcast))
        leaves = to_numpy(plan.update(state, plan.report(*total)))
        state = leaves[:state_leaves]
        told = [value for value in leaves[state_leaves:] if value.dtype == np.float32 and not value.ndim]
        loss = f": loss {float(told[0]):.3f}" if told else ""  # private training tells none
        print(f"round {number} of {rounds}, {number * local} steps a site{loss}", flush=True)
        if number in kept:
            weights = to_numpy(plan.prepare(*state))[:weights_leaves]  # a broadcast begins with the model
            write_tensors(snapshot(folder, number * local * len(sites)), weights)
        write_tensors(checkpoint_path(folder), [*(np.asarray(leaf) for leaf in state), np.asarray(number)])
    return {number: read_tensors(snapshot(folder, number * local * len(sites))) for number in kept}


def checkpoint_path(folder: Path) -> Path:
    """Where an arm keeps what it goes on from."""
    return folder / "checkpoint.tensors"


def checkpoint(folder: Path) -> list[Any] | None:
    """What the arm wrote last; None where it has not begun. Raises SystemExit where that cannot be read."""
    if not checkpoint_path(folder).exists():
        return None
    try:
        return list(read_tensors(checkpoint_path(folder)))
    except WireError as error:
        raise SystemExit(f"{error}; remove {folder} to train this arm anew") from error


def snapshot(folder: Path, step: int) -> Path:
    """Where an arm keeps its weights after so many gradient steps, counted over all sites."""
    return folder / f"step-{step:06d}.tensors"
