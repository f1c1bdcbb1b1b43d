"""Where a published version comes from: plan, sites under their pseudonyms, and who answers for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.security.signing import Signer
from common.study import Study
from server.evaluation import DetailedResult, HoldoutResult
from server.journal import read_history
from server.pseudonyms import pseudonyms
from server.publishing.variant import Variant
from server.run_folder import RunFolder

_Result = TypeVar("_Result", HoldoutResult, DetailedResult)


@dataclass(frozen=True)
class Provenance:
    """What a version's papers say of its origin.

    Attributes
    ----------
    plan : the digest of the plan of its rounds, in hexadecimal digits; "" where it is not known.
    pseudonyms : what the papers call each site; one that is not in it keeps its name.
    rounds : in how many rounds up to the published one each site's update was summed, by its own name.
    signer : who signs; None leaves the version unsigned, as no run of a study does.
    """

    plan: str = ""
    pseudonyms: Mapping[str, str] = field(default_factory=dict)
    rounds: Mapping[str, int] = field(default_factory=dict)
    signer: Signer | None = None

    def sites(self, study: Study) -> list[dict[str, Any]]:
        """The manifest's list of sites, in the order of their pseudonyms."""
        named = {self.name_of(site): self.rounds.get(site) for site in study.cohort.sites}
        return [{"name": name, "rounds": rounds} for name, rounds in sorted(named.items())]

    def name_of(self, site: str) -> str:
        """What the papers call a site."""
        return self.pseudonyms.get(site, site)

    def of_study(self, study: Study) -> Study:
        """The study with its sites as the papers call them."""
        sites = tuple(sorted(map(self.name_of, study.cohort.sites)))
        return dataclasses.replace(study, cohort=dataclasses.replace(study.cohort, sites=sites))

    def of_variant(self, variant: Variant) -> Variant:
        """A variant whose figures are of sites as the papers call them."""
        return dataclasses.replace(
            variant,
            result=self._renamed(variant.result) if variant.result is not None else None,
            detailed=self._renamed(variant.detailed) if variant.detailed is not None else None,
        )

    def of_privacy(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """A report of `privacy_report` with its sites as the papers call them, in that order."""
        named = {self.name_of(site): epsilon for site, epsilon in report.get("sites", {}).items()}
        return {**report, **({"sites": dict(sorted(named.items()))} if "sites" in report else {})}

    def _renamed(self, result: _Result) -> _Result:
        sites = tuple(None if site is None else self.name_of(site) for site in result.sites)
        return dataclasses.replace(result, sites=sites)


def provenance_of(study: Study, run: RunFolder, round_number: int, signer: Signer) -> Provenance:
    """The provenance of a round of a run.

    Raises
    ------
    RunFolderError : the run's journal, or its key for pseudonyms, cannot be read.
    """
    history = read_history(run.journal)
    cohorts = [
        found.closed or ()
        for number in range(1, round_number + 1)
        if (found := history.find("train", number)) is not None
    ]
    rounds = {site: sum(site in cohort for cohort in cohorts) for site in study.cohort.sites}
    return Provenance(history.plan, pseudonyms(run, study.name, study.cohort.sites), rounds, signer)
