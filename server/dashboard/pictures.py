"""Sample predictions of the holdout, as a page shows them: found by their numbers, never by a path from a request."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.watching.samples import KINDS, Sample, read_samples, sampled_rounds

WORDS: Final = {"image": "Image", "truth": "Truth", "prediction": "Prediction", "difference": "Difference"}


@dataclass(frozen=True)
class Pictures:
    """What pictures a run has.

    Attributes
    ----------
    rounds : those that have some, the newest first.
    samples : of the newest round; cases and slices are the same in every round.
    """

    rounds: tuple[int, ...] = ()
    samples: tuple[Sample, ...] = ()

    @staticmethod
    def of(run: Path) -> Pictures:
        """Those of a run now."""
        rounds = tuple(reversed(sampled_rounds(run)))
        return Pictures(rounds, read_samples(run, rounds[0]) if rounds else ())

    def shown(self, *, embedded: bool = False) -> dict[str, Any]:
        """For the template: "rounds", "kinds", and "cases", each with its slices and the pictures of a middle one.

        Parameters
        ----------
        embedded : pictures are part of the page, of every slice; else each is fetched.
        """
        return {
            "rounds": list(self.rounds),
            "kinds": WORDS,
            "cases": [
                {
                    "number": number,
                    "case": sample.case,
                    "site": sample.site,
                    "dice": sample.dice,
                    "heights": [one.z for one in sample.slices],
                    "slices": [
                        {kind: _embedded(getattr(one, kind)) for kind in KINDS} for one in sample.slices
                    ] if embedded else [],
                    "place": len(sample.slices) // 2,
                }
                for number, sample in enumerate(self.samples)
                if sample.slices
            ],
        }  # fmt: skip


def picture(run: Path, round_number: int, case: int, place: int, kind: str) -> Path | None:
    """Where a picture lies; None where there is none of these numbers."""
    samples = read_samples(run, round_number)
    if kind not in KINDS or case >= len(samples) or place >= len(samples[case].slices):
        return None
    found: Path = getattr(samples[case].slices[place], kind)
    return found


def _embedded(path: Path) -> str:
    try:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return "data:,"
