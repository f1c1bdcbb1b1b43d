"""Encoder weights come from a file by their names, or a message says why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import StudyError
from common.models import build_network
from common.models.encoder_weights import load_encoder_weights, with_encoder_weights
from common.models.network import Network
from common.study import Study


@pytest.fixture
def network(tiny_study: Callable[..., Study]) -> Network:
    study = tiny_study()
    return build_network(dataclasses.replace(study, model=dataclasses.replace(study.model, name="mobilenetv3_small")))


def test_the_named_weights_are_taken_and_all_others_stay(tensorflow: None, network: Network, tmp_path: Path) -> None:
    first, second = [spec for spec in network.specs if spec.name.startswith("encoder/")][:2]
    arrays = {second.name: np.full(second.shape, 2.0), first.name: np.full(first.shape, 1.0, np.float16)}
    np.savez(tmp_path / "encoder.npz", **arrays, **{"classifier/kernel": np.zeros(3)})
    values = load_encoder_weights(network, tmp_path / "encoder.npz")
    assert list(values) == [first.name, second.name]
    initial = network.initial_weights(1)
    weights = with_encoder_weights(network, initial, values)
    for spec, weight, before in zip(network.specs, weights, initial, strict=True):
        assert weight.dtype == np.float32
        expected = {first.name: 1.0, second.name: 2.0}.get(spec.name, before)
        np.testing.assert_array_equal(weight, np.broadcast_to(expected, spec.shape))


def test_what_does_not_fit_is_named(tensorflow: None, network: Network, tmp_path: Path) -> None:
    path = tmp_path / "encoder.npz"
    spec = next(spec for spec in network.specs if spec.name.startswith("encoder/"))

    def refused(**arrays: np.ndarray) -> str:
        np.savez(path, **arrays)
        with pytest.raises(StudyError, match=r"^model\.encoder_weights: ") as error:
            load_encoder_weights(network, path)
        assert str(path) in str(error.value)
        return str(error.value)

    assert f"{spec.name}: expected float values of shape {spec.shape}" in refused(**{spec.name: np.zeros([2, 2])})
    assert "finite" in refused(**{spec.name: np.full(spec.shape, np.nan)})
    assert "int64" in refused(**{spec.name: np.zeros(spec.shape, np.int64)})
    assert "encoder/other is not of this encoder" in refused(**{"encoder/other": np.zeros(1)})
    assert f"named like {spec.name}, found none" in refused(kernel=np.zeros(1))
    assert "cannot be read" in refused(**{spec.name: np.array([None])})  # a pickle
    path.write_bytes(b"no archive")
    with pytest.raises(StudyError, match="cannot be read"):
        load_encoder_weights(network, path)
    with pytest.raises(StudyError, match="cannot be read"):
        load_encoder_weights(network, tmp_path / "missing.npz")


def test_a_network_without_an_encoder_takes_no_file(
    tensorflow: None, tiny_study: Callable[..., Study], tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match="no encoder to load"):
        load_encoder_weights(build_network(tiny_study()), tmp_path / "encoder.npz")
