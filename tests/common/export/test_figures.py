"""What is measured of converted files."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest

from common.export.figures import json_ready, median_seconds, tolerance_of


def test_models_take_turns_and_their_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    called: list[str] = []
    lasting = {"a": [100.0, 1.0, 9.0, 2.0], "b": [50.0, 4.0, 4.0, 4.0]}

    def model(name: str, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        nonlocal now
        assert batch.shape == (1, 3, 2)
        now += lasting[name][called.count(name)]
        called.append(name)
        return batch

    monkeypatch.setattr("time.perf_counter", lambda: now)
    models = {name: lambda batch, name=name: model(name, batch) for name in lasting}
    assert median_seconds(models, np.zeros((3, 2), np.float32), runs=3) == {"a": 2.0, "b": 4.0}
    assert called == ["a", "b"] * 4


def test_a_file_may_differ_twice_as_much_elsewhere_and_always_a_little() -> None:
    assert [tolerance_of(difference) for difference in (0.0, 4e-4, 0.01)] == [1e-3, 1e-3, 0.02]


def test_figures_become_plain_json_and_what_does_not_exist_null() -> None:
    figures = {1: np.float32(0.5), "all": (np.int64(3), math.nan, math.inf, None, True), "of": {"x": np.float64("nan")}}
    plain = {"1": 0.5, "all": [3, None, None, None, True], "of": {"x": None}}
    assert json.loads(json.dumps(json_ready(figures), allow_nan=False)) == plain
