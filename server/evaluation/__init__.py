"""How well weights or published files segment the coordinator's holdout: images that no site trained on.

`holdout` segments whole images and compares them with their labels; `result` holds what every round measures, Dice and
IoU, and `detailed` all metrics of a published version. `published` runs a version's files by LiteRT, and
`common.export.forward` weights by TensorFlow; the measure is the same. `tables` shows results.
"""

from __future__ import annotations

from server.evaluation.detailed import DetailedResult
from server.evaluation.holdout import Holdout, HoldoutCase, site_of_origin
from server.evaluation.result import LARGE_SITE_CASES, HoldoutResult

__all__ = [
    "LARGE_SITE_CASES",
    "DetailedResult",
    "Holdout",
    "HoldoutCase",
    "HoldoutResult",
    "site_of_origin",
]
