"""What a study says of privacy, in the words of a site's policy and review: one place that reads the study's keys."""

from __future__ import annotations

from dataclasses import dataclass

from common.study import Study


@dataclass(frozen=True)
class StudyPrivacy:
    """The privacy settings of a study.

    Attributes
    ----------
    personal : which layers stay at the site; "none" where none do.
    unit : whose data noise hides, "patient" (added at the site) or "site" (added by the coordinator); "none" without
        differential privacy.
    epsilon, delta : the study's budget; both 0 without differential privacy.
    secure_aggregation : whether the coordinator can read only the sum of the updates.
    """

    personal: str
    unit: str = "none"
    epsilon: float = 0.0
    delta: float = 0.0
    secure_aggregation: bool = False


def privacy_of(study: Study) -> StudyPrivacy:
    """The study's settings."""
    privacy = study.privacy
    secure = study.secure_aggregation.required
    return StudyPrivacy(study.training.personal, privacy.unit, privacy.epsilon, privacy.delta, secure)
