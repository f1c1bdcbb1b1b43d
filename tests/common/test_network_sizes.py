"""The numbers of a network counted without TensorFlow are those of the network that is built."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from common.network_sizes import NetworkSize, size_of, size_without_tensorflow
from common.study import Study, parse_study

NETWORKS_2D = ("unet", "residual_unet", "attention_unet", "dilated_unet")


def study_of(name: str, normalization: str, dimensions: int, head: str = "softmax") -> Study:
    depth = 2
    patch = [16] * dimensions
    return parse_study(
        f"""
study: sizes
task: {{dimensions: {dimensions}, channels: 3, classes: [background, one, two]}}
model: {{name: {name}, filters: 3, depth: {depth}, normalization: {normalization}, head: {head}}}
preprocessing: {{patch: {patch}}}
training: {{rounds: 1}}
cohort: {{sites: [north]}}
"""
    )


@pytest.mark.parametrize("name", NETWORKS_2D)
@pytest.mark.parametrize("normalization", ["weight", "group", "batch", "none"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_count_is_that_of_the_network(name: str, normalization: str, dimensions: int) -> None:
    from common.models import build_network

    study = study_of(name, normalization, dimensions, head="sigmoid" if dimensions == 2 else "softmax")
    network = build_network(study)
    statistics = sum(math.prod(spec.shape) for spec in network.statistics)
    assert size_without_tensorflow(study) == NetworkSize(network.parameters, statistics)


def test_networks_with_an_encoder_are_built_to_be_counted() -> None:
    from common.models import build_network

    study = study_of("unet", "weight", 2)
    study = replace(study, model=replace(study.model, name="mobilenetv3_small"))
    assert size_without_tensorflow(study) is None
    assert size_of(study).weights == build_network(study).parameters


def test_an_update_has_four_bytes_a_number() -> None:
    assert NetworkSize(10, 4).update_bytes == 56
