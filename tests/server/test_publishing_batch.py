"""Batch normalization leaves no trace in a published file but the numbers of its convolutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.export.forward import predictor
from common.inference.lite import LiteModel
from common.models import build_network
from common.study import Study
from server.publishing.contents import contents_of
from server.publishing.conversion import convert


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_file_computes_the_inference_pass_with_the_operations_of_a_network_without_normalization(
    tensorflow: None, tiny_study: Callable[..., Study], tmp_path: Path, dimensions: int
) -> None:
    files = {}
    for normalization in ("batch", "none"):
        study = tiny_study(dimensions=dimensions, normalization=normalization)
        network = build_network(study)
        rng = np.random.default_rng(5)
        # As after training: every statistic, gain and bias has another value than at the beginning.
        weights = [
            weight.numpy() * rng.uniform(0.5, 2, weight.shape) + rng.uniform(0, 0.1, weight.shape)
            for weight in network.initial_weights(0)
        ]
        files[normalization] = convert(study, network, weights, "float32", [])
        path = tmp_path / f"{normalization}.tflite"
        path.write_bytes(files[normalization])
        tile = rng.normal(size=(1, *study.publishing.tile, 1)).astype(np.float32)
        expected = predictor(study, network, weights)(tile)
        assert expected.std() > 0.1
        np.testing.assert_allclose(LiteModel(path)(tile), expected, atol=1e-3)
    batch, none = contents_of(files["batch"]), contents_of(files["none"])
    assert batch.unfolded == none.unfolded
    assert batch.float_operations == none.float_operations
    assert batch.weight_bytes == none.weight_bytes
