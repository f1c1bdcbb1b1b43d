"""The coordinator's file of how it is watched: alerts and where they go, and experiment tracking.

It is no part of the study: it decides no result, and sites never see it.

    alerts:
      webhook: https://alerts.example.org/wardround
      secret_file: /etc/wardround/webhook.key
      dice_drop: 0.05
    tracking:
      mlflow: http://127.0.0.1:5000
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from common import study_reader
from common.errors import UsageError
from common.study_reader import Found
from common.study_rules import Absent, Duration, Number, Text
from server.run_folder import RunFolder, write_atomically
from server.watching.alerts import AlertRules
from server.watching.snapshot import RULES

_URL = Text(r"https?://[^\s/@]+(/\S*)?", "an address such as https://alerts.example.org/wardround, without a password")
_MLFLOW = Text(r"(https?|sqlite|file)://?/?\S+", "an MLflow tracking address, such as http://127.0.0.1:5000")
_PATH = Text(r"\S(.{0,4094}\S)?", "a path")
_NAME = Text(r"\S(.{0,250}\S)?", "a name")
_SHORTEST_SECRET = 16
_RULES = AlertRules()


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertOptions:
    """When to warn (`server.watching.alerts.AlertRules`) and whom: `webhook` is called, signed by what `secret_file`
    holds."""

    webhook: Annotated[str | None, _URL] = None
    secret_file: Annotated[str | None, _PATH] = None
    dice_drop: Annotated[float, Number(above=0, maximum=1)] = _RULES.dice_drop
    silent: Annotated[float, Duration()] = _RULES.silent_seconds
    disk_gb: Annotated[float, Number(minimum=0, maximum=1e6)] = _RULES.disk_gb
    budget_share: Annotated[float, Number(above=0, maximum=1)] = _RULES.budget_share

    @property
    def rules(self) -> AlertRules:
        """When to warn."""
        return AlertRules(self.dice_drop, self.silent, self.disk_gb, self.budget_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """Where runs are tracked; `artifacts`: whether the published version goes there too."""

    mlflow: Annotated[str | None, _MLFLOW] = None
    experiment: Annotated[str, _NAME] = "wardround"
    artifacts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The whole file."""

    alerts: Annotated[AlertOptions, Absent()]
    tracking: Annotated[Tracking, Absent()]

    def write_rules(self, run: RunFolder) -> None:
        """Leaves the rules in the run folder, where everybody who reads the run finds them; no address, no secret."""
        write_atomically(run.path / RULES, json.dumps({"alerts": asdict(self.alerts.rules)}), durable=False)


def load_options(path: Path | None) -> Options:
    """The file, or what holds without one.

    Raises
    ------
    UsageError : it cannot be read, with a line for each problem.
    """
    if path is None:
        return parse_options("alerts: {}\n", "no file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a YAML file with --watching") from error
    return parse_options(text, str(path))


def parse_options(text: str, source: str) -> Options:
    """The file's text; `source` is what errors call it. Raises UsageError."""
    return study_reader.read(Options, text, source, (_secret_with_webhook,), what="watching file", error=UsageError)


def read_secret(path: Path) -> bytes:
    """The key that signs what a webhook is sent.

    Raises
    ------
    UsageError : it cannot be read, is open to other users, or too short to be one.
    """
    make = f"make one: `(umask 077; openssl rand -hex 32 > {path})`"
    try:
        mode, secret = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"{path}: the webhook's secret cannot be read ({error.strerror}); {make}") from error
    if mode & 0o077:
        raise UsageError(f"{path}: the webhook's secret is open to other users; `chmod 600 {path}`")
    if len(secret) < _SHORTEST_SECRET:
        raise UsageError(f"{path}: a secret of {len(secret)} bytes, at least {_SHORTEST_SECRET}; {make}")
    return secret


def _secret_with_webhook(found: Found) -> None:
    known = found.known("alerts.webhook", "alerts.secret_file")
    if known and (known[0] is None) != (known[1] is None):
        path = "alerts.webhook" if known[0] is not None else "alerts.secret_file"
        found.refuse(path, found.nodes[path], "webhook and secret_file together, or neither", "one of them")
