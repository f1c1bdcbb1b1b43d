"""docs/threat-model.md names tests: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ATTACKS = "tests/common/secure_aggregation/test_attacks.py"


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", text)
    assert len(named) > 60
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / (path or ATTACKS)).read_text(encoding="utf-8"), f"{path}::{name}"


def test_every_attack_on_secure_aggregation_is_in_the_threat_model() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    missing = [
        name
        for name in re.findall(r"\ndef (test_\w+)\(", (ROOT / ATTACKS).read_text(encoding="utf-8"))
        if f"`{name}`" not in text
    ]
    assert missing == ["test_a_key_that_fixes_the_secret_in_advance_is_refused"]  # refused by the library


def test_links_of_the_security_pages_lead_somewhere() -> None:
    for page in (ROOT / "docs" / "threat-model.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
