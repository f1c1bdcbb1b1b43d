"""A data set that is registered at a level of its pyramids: read, checked, remembered and cached at that level."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from client.cli import main
from client.registry import Registry
from client.registry_rows import case_of, layout_of
from client.selection import select_cases
from common.imaging.case import Source
from common.imaging.layouts.options import Layout
from common.study import parse_study

STUDY = """
study: tiny
task: {dimensions: 2, channels: 1, classes: [background, cell]}
preprocessing: {patch: [16, 16]}
training: {rounds: 2}
cohort: {sites: [alpha], minimum_cases: 1}
"""


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "registry.sqlite"
    monkeypatch.setenv("WARDROUND_SITE_REGISTRY", str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cases; the label of the second has no third level."""
    for index, levels in enumerate((3, 2)):
        image = np.random.default_rng(index).integers(0, 200, (64, 96)).astype(np.uint8)
        label = np.zeros_like(image)
        label[8:40, 16 : 48 + 16 * index] = 1
        for kind, array, count in (("images", image, 3), ("labels", label, levels)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            tiled = {"tile": (16, 16), "photometric": "minisblack", "compression": "zlib"}
            with tifffile.TiffWriter(tmp_path / "data" / kind / f"P{index}.tif") as writer:
                writer.write(array, subifds=count - 1, **tiled)
                for level in range(1, count):
                    writer.write(array[:: 2**level, :: 2**level], subfiletype=1, **tiled)
    return tmp_path / "data"


def test_data_are_read_at_the_level_they_are_registered_with(
    folder: Path, registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = set()
    for level in range(3):
        name = f"at-{level}"
        assert main(["data", "add", name, str(folder), f"--level={level}", "--json"]) == 0
        added = json.loads(capsys.readouterr().out)["check"]
        assert added["counts"]["by_code"] == ({"E115": 1} if level == 2 else {})
        (case, *_) = added["cases"]
        shapes = [case["images"][""]["shape"], case["label"]["shape"]]
        assert shapes == [[1, 64 >> level, 96 >> level]] * 2
        study = parse_study(STUDY)
        opened = Registry(registry)  # as another command does
        chosen = select_cases(study, [name], opened)
        assert opened.get(name).layout == Layout(level=level)
        assert {source.level for case in chosen.cases for source in case.sources} == {level}
        assert len(chosen.cases) == (1 if level == 2 else 2)
        keys.add(chosen.key(chosen.cases[0], study))
        opened.close()
    assert len(keys) == 3, "one prepared case for each level"


def test_level_below_the_first_is_bad_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "add", "cells", str(folder), "--level=-1"]) == 2
    assert "level -1: expected 0" in capsys.readouterr().err


def test_what_was_registered_before_there_were_levels_is_at_the_full_resolution() -> None:
    assert layout_of('{"channel_map": {}, "label": "_gt$", "patient_pattern": ""}') == Layout(label="_gt$")
    case = case_of("a", '"a"', '{"": ["/data/a.tif", ""]}', '["/data/b", "1.2.3"]')
    assert case.sources == [Source(Path("/data/a.tif")), Source(Path("/data/b"), "1.2.3")]
