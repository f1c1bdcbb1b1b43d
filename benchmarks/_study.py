"""The study that benchmarks compile: a U-Net, one local step size, no validation and no holdout."""

from __future__ import annotations

from collections.abc import Sequence

from common.study import Study, parse_study


def benchmark_study(
    *,
    filters: int = 16,
    depth: int = 4,
    normalization: str = "weight",
    patch: Sequence[int] = (128, 128),
    channels: int = 3,
    batch_size: int = 8,
    threads: int = 1,
    rounds: int = 1,
    sites: Sequence[str] = ("site-00",),
    extra: str = "",
) -> Study:
    """A study of these sizes; Adam of rate 1e-3 at the sites, plain averaging at the coordinator.

    `extra` is one more section, on one line.
    """
    return parse_study(
        f"""
        study: benchmark
        task: {{dimensions: {len(patch)}, channels: {channels}, classes: [background, object]}}
        model: {{filters: {filters}, depth: {depth}, normalization: {normalization}}}
        preprocessing: {{patch: {list(patch)}}}
        augmentation: []
        training:
          rounds: {rounds}
          batch_size: {batch_size}
          threads: {threads}
          client_optimizer: {{name: adam, learning_rate: 1e-3}}
        cohort: {{sites: [{", ".join(sites)}]}}
        evaluation: {{validation_fraction: 0, holdout: false}}
        {extra}
        """
    )
