"""What a site's own people should know without having asked: a pure function from its status to alerts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from common.security.expiry import expiry_words
from common.watching.alert import SEVERITIES, Alert, Severity

_BUDGET_SHARE: Final = 0.9
_DISK_GB: Final = 2.0
_SILENT_SECONDS: Final = 60.0
_ENDED = ("finished", "stopped")


def site_alerts(status: Mapping[str, Any], *, now: float, disk_free: int | None) -> tuple[Alert, ...]:
    """What is wrong at a site, the most severe first.

    Parameters
    ----------
    status : as `client.site_status.read_status` reads it.
    now : Unix time.
    disk_free : free bytes of the work folder's disk; None where the system does not say.
    """
    site = str(status.get("site", "the site"))
    found: list[Alert] = []
    if status.get("state") == "failed":
        todo = str(status.get("next_step") or "See its log.")
        detail = str(status.get("notice") or "")
        found.append(Alert("site-failed", "critical", f"{site} has failed.", site, todo, None, detail))
    if status.get("running") and status.get("state") not in _ENDED:
        found += [*_line(site, status, now), *_certificate(site, status, now), *_disk(site, disk_free)]
    found += _budget(site, status)
    return tuple(sorted(found, key=lambda alert: SEVERITIES.index(alert.severity)))


def _line(site: str, status: Mapping[str, Any], now: float) -> Iterator[Alert]:
    since = status.get("connected_since")
    if status.get("connected") is False and since is not None and now - float(since) >= _SILENT_SECONDS:
        what = f"{site} has had no line to the coordinator for {now - float(since):.0f} s."
        todo = "See whether the coordinator runs and the network lets the site reach it; the site goes on trying."
        yield Alert("coordinator-silent", "warning", what, site, todo, None, str(status.get("notice") or ""))


def _certificate(site: str, status: Mapping[str, Any], now: float) -> Iterator[Alert]:
    until = status.get("certificate_expires")
    if words := expiry_words(until, now):
        severity: Severity = "critical" if until is not None and until <= now else "warning"
        todo = f"Renew it with `wardround-site rotate --identity {shlex.quote(str(status.get('identity', 'DIR')))}`."
        yield Alert("certificate-ending", severity, f"The certificate of {site} {words}.", site, todo)


def _budget(site: str, status: Mapping[str, Any]) -> Iterator[Alert]:
    privacy = status.get("privacy") or {}
    epsilon, budget = float(privacy.get("epsilon") or 0), float(privacy.get("budget") or 0)
    if budget and epsilon >= _BUDGET_SHARE * budget:
        what = f"{site} has spent epsilon {epsilon:.2f} of the budget of {budget:g}."
        yield Alert("budget-ending", "warning", what, site, "Nothing: no round begins that would pass it.")


def _disk(site: str, free: int | None) -> Iterator[Alert]:
    if free is not None and free < _DISK_GB * 1e9:
        todo = "Free space, or give the site a smaller --cache-gb."
        yield Alert("disk-low", "warning", f"The disk of {site} has {free / 1e9:.2f} GB left.", site, todo)
