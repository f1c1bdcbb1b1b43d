"""The studies that are run: as small as a study can be that still has every step."""

from __future__ import annotations

from tests.system.faults.arena import Scenario

REAL = Scenario(
    """\
study: faults
seed: 3
task: {dimensions: 2, channels: 3, classes: [background, cell], labels: instances}
model: {filters: 4, depth: 1, head: sigmoid}
preprocessing: {patch: [32, 32]}
training: {rounds: 3, patches_per_epoch: 24, batch_size: 4}
cohort: {sites: [east, north], quorum: 2, deadline: 30m}
publishing: {variants: [float32], tile: [64, 64]}
""",
    real=True,
)
"""Two sites that train and validate."""


def light(
    *,
    sites: int = 3,
    rounds: int = 4,
    filters: int = 4,
    depth: int = 1,
    quorum: int | None = None,
    deadline: str = "30m",
    batch_seconds: float = 0.02,
    secure: bool = False,
) -> Scenario:
    """A study of light sites, `site-00` and on; its quorum is all of them unless said otherwise.

    `secure`: their updates are summed securely.
    """
    names = [f"site-{number:02d}" for number in range(sites)]
    text = f"""\
study: light
seed: 3
task: {{dimensions: 2, channels: 1, classes: [background, cell]}}
model: {{filters: {filters}, depth: {depth}}}
preprocessing: {{patch: [32, 32]}}
augmentation: []
training: {{rounds: {rounds}, batch_size: 1}}
cohort: {{sites: [{", ".join(names)}], quorum: {quorum or sites}, deadline: {deadline}}}
evaluation: {{validation_fraction: 0, holdout: false}}
publishing: {{variants: [float32], tile: [32, 32]}}
{"secure_aggregation: {protocol: bonawitz}" if secure else ""}
"""
    return Scenario(text, batch_seconds=batch_seconds)


SECURE = light(sites=5, rounds=3, secure=True)
"""Five light sites whose updates are summed securely."""
