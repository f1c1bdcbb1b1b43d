"""The plan of a round: a learning process as the few pure functions that coordinator and sites run, and its digest.

`tff.backends.mapreduce.MapReduceForm` is TFF's seam between an algorithm and a deployment:

    broadcast = prepare(state)                       coordinator
    update    = work(data, broadcast)                each site
    accumulate(total, update) ...                    coordinator, from `total = zero()`; `merge` joins two totals
    state, result = update(state, report(total))     coordinator

Here every value is a flat list of tensors (the leaves of its TFF type, in order), so that it can cross the wire.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.graph import Graph, leaf_types, to_numpy
from common.learning.process import build_evaluation_process, build_training_process
from common.models.operations import NATIVE, Operations
from common.secure_aggregation.masking import InputSpec
from common.study import Study
from common.wire.tensors import TensorSpec

PLAN_FORMAT = 1
"""The version of what a plan means: raise it when the same study would train or be encoded differently."""

Tensors = list[Any]

# TFF would have Grappler rewrite every graph of the form, which takes seconds and writes out large constants;
# TensorFlow optimizes them again when it runs them.
NO_GRAPPLER = tf.compat.v1.ConfigProto()
NO_GRAPPLER.graph_options.rewrite_options.disable_meta_optimizer = True

# With autotuning, tf.data confines the thread that continues after a batch to one core, at random from call to call:
# training runs at half the speed, and with sums split otherwise.
NO_AUTOTUNE = tf.data.Options()
NO_AUTOTUNE.autotune.enabled = False


class RoundPlan:
    """One round of a learning process, compiled.

    Parameters
    ----------
    process : the process that TFF built.

    Attributes
    ----------
    prepare, work, zero, accumulate, merge, report, update : see the module's first lines; each a `Graph`, imported on
        first use, so that a site pays for `work` alone.
    noise_seed : which leaf of the state is the seed of the noise that is added to the sum, int64 (2,): to be drawn
        anew for each round. None where there is no such noise.
    broadcast, sent : what `prepare` sends down and what a site sends up, as `TensorSpec`s.
    secure : where the study has secure aggregation, the shapes and bit widths of what `work` gives: whole numbers, of
        which nothing but the sum may be seen. () where updates are sent as they are.
    """

    def __init__(self, process: tff.learning.templates.LearningProcess) -> None:
        self.process = process
        form = tff.backends.mapreduce.get_map_reduce_form_for_computation(process.next, NO_GRAPPLER)
        self.prepare = Graph(form.prepare)
        self.merge = Graph(form.merge)
        self.report = Graph(form.report)
        self._zero: tff.Computation = form.zero
        self._accumulate = Graph(form.accumulate)
        self._work = Graph(form.work)
        self._update = Graph(form.update)
        self.secure = _secure_specs(form)
        self.broadcast = _specs(self.prepare.result)
        self.sent = tuple(map(_narrow, self.secure)) if self.secure else _specs(self._work.result)
        self.state_type: tff.Type = process.next.type_signature.parameter[0].member
        self.result_type: tff.Type = process.next.type_signature.result
        self.noise_seed = _noise_seed(self.state_type)
        self.data_element: tff.Type = process.next.type_signature.parameter[1].member.element

    def initialize(self) -> Tensors:
        """The state before the first round. Compiled for this one call: a graph that is kept keeps the weights."""
        initialize = self.process.initialize
        return Graph(tff.backends.mapreduce.get_state_initialization_computation(initialize, NO_GRAPPLER))()

    def zero(self) -> Tensors:
        """A total of no updates. Compiled anew for each, for the reason of `initialize`."""
        return Graph(self._zero)()

    def accumulate(self, total: Tensors, update: Sequence[Any]) -> None:
        """Adds an update to `total`, in its place: there is never more than one total in memory."""
        self._accumulate.replace(total, update)

    def work(self, dataset: tf.data.Dataset, broadcast: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
        """What a site sends for its data, or masks: arrays of the types in `sent`."""
        found = to_numpy(self._work(dataset.with_options(NO_AUTOTUNE), *broadcast))
        if not self.secure:
            return found
        return [value.astype(spec.dtype, copy=False) for value, spec in zip(found, self.sent, strict=True)]

    def update(self, state: Sequence[Any], report: Sequence[Any]) -> Tensors:
        """The leaves of `result_type`: those of the next state, then those of the round's metrics."""
        return self._update(*state, *report)

    def securely_updated(self, state: Sequence[Any], sums: Sequence[np.ndarray[Any, Any]]) -> Tensors:
        """As `update`, from the sums of what `work` gave at the sites, int64, in the shapes of `secure`."""
        reported = self.report(*self.zero())
        types = leaf_types(self._update.parameter)[len(state) + len(reported) :]
        cast = [total.astype(leaf.dtype, copy=False) for total, leaf in zip(sums, types, strict=True)]
        return self._update(*state, *reported, *cast)


@dataclass(frozen=True)
class StudyPlan:
    """Both rounds of a study and the digest by which coordinator and sites know that they mean the same."""

    study: Study
    train: RoundPlan
    evaluate: RoundPlan | None
    digest: bytes = field(repr=False)


def build_plan(study: Study, operations: Operations = NATIVE) -> StudyPlan:
    """Compiles the study; takes 2 to 6 seconds. `evaluate` is None where the study has no validation cases.

    `operations` compute the convolutions of `train.work`: a site may train faster than in float32, by the same plan.
    """
    train = RoundPlan(build_training_process(study, operations))
    evaluate = RoundPlan(build_evaluation_process(study)) if study.evaluation.validation_fraction > 0 else None
    return StudyPlan(study, train, evaluate, _digest(study, {"train": train, "evaluate": evaluate}))


def _digest(study: Study, rounds: dict[str, RoundPlan | None]) -> bytes:
    types = {
        name: {"broadcast": [str(s) for s in plan.broadcast], "sent": [str(s) for s in plan.sent]}
        | ({"bits": [spec.bits for spec in plan.secure]} if plan.secure else {})
        for name, plan in rounds.items()
        if plan is not None
    }
    content = {"format": PLAN_FORMAT, "study": json.loads(study.canonical()), "types": types}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()


def _secure_specs(form: tff.backends.mapreduce.MapReduceForm) -> tuple[InputSpec, ...]:
    plain, *secure = form.work.type_signature.result
    if not any(leaf_types(part) for part in secure):
        return ()
    if leaf_types(plain) or any(leaf_types(part) for part in secure[1:]):  # a defect here, that nobody may run
        raise TypeError(f"expected nothing but sums of a bit width beside secure ones, found {form.work}")
    bits = Graph(form.secure_sum_bitwidth)()
    leaves = leaf_types(secure[0])
    return tuple(InputSpec(tuple(leaf.shape), int(width)) for leaf, width in zip(leaves, bits, strict=True))


def _narrow(spec: InputSpec) -> TensorSpec:
    """How a site holds a number of so many bits, which TFF gives as int64."""
    return TensorSpec(f"uint{next(width for width in (8, 16, 32, 64) if spec.bits <= width)}", spec.shape)


def _noise_seed(state_type: tff.Type) -> int | None:
    place = 0
    for name, part in tff.structure.iter_elements(state_type):
        leaves = leaf_types(part)
        if name == "aggregator" and isinstance(part, tff.StructType) and "seed" in tff.structure.name_list(part):
            before = tff.structure.name_list(part).index("seed")
            return place + sum(len(leaf_types(part[index])) for index in range(before))
        place += len(leaves)
    return None


def _specs(type_signature: tff.Type) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(np.dtype(leaf.dtype).name, tuple(leaf.shape)) for leaf in leaf_types(type_signature))
