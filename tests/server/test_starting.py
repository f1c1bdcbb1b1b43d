"""What a run starts from: a published version's weights, checked, and kept in the run folder."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from common.errors import IdentityError, PublishError, StudyError
from common.inference.trust import Trust
from common.inference.version_files import PublishedWeights, open_weights
from common.models import build_network
from common.security.audit import NO_AUDIT
from common.study import Study, load_study
from common.wire.tensors import write_tensors
from server.continual import card_section, rows_of
from server.publishing import publish
from server.publishing.provenance import Provenance
from server.results import Evaluated, publish_round
from server.run_folder import RunFolder
from server.starting import Start, TrustOf, check_fits, kept_start, signed, starting_weights
from tests.signers import coordinator_of, identities


def unsigned(own: Path | None) -> Trust:
    """Whom most tests believe."""
    return Trust(None, allow_unsigned=True)


def published_study(tiny_study: Callable[..., Study]) -> Study:
    study = tiny_study()
    return dataclasses.replace(study, publishing=dataclasses.replace(study.publishing, variants=("float32",)))


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory, tiny_study: Callable[..., Study]) -> Path:
    """A version in a run's folder, of weights that no seed gives."""
    run = RunFolder(tmp_path_factory.mktemp("before") / "run")
    study = published_study(tiny_study)
    run.prepare(study)
    network = build_network(study)
    weights = [weight.numpy() + np.float32(0.01) for weight in network.initial_weights(7)]
    publish(study, weights, None, run.published / "v1", details={"round": 2})
    return run.published / "v1"


@pytest.fixture
def start(tmp_path: Path, tiny_study: Callable[..., Study]) -> Callable[..., Any]:
    """Starts a run of the tiny study, with changes to its sections, from a folder; gives its folder and start."""

    def begin(folder: Path | None, trust: TrustOf = unsigned, **sections: dict[str, Any]) -> Any:
        study = tiny_study()
        for name, changes in sections.items():
            study = dataclasses.replace(study, **{name: dataclasses.replace(getattr(study, name), **changes)})
        training = dataclasses.replace(study.training, start_from=str(folder) if folder else None)
        study = dataclasses.replace(study, training=training)
        run = RunFolder(tmp_path / "run")
        run.prepare(study)
        return run, starting_weights(study, run, build_network(study), trust)

    return begin


def test_a_version_that_nobody_signed_or_somebody_else_is_refused(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, weights = load_study(version / "study.yaml"), list(open_weights(version).weights)

    def start(folder: Path) -> Start | None:
        training = dataclasses.replace(study.training, start_from=str(folder))
        run = RunFolder(Path(tempfile.mkdtemp(dir=tmp_path)))
        return starting_weights(dataclasses.replace(study, training=training), run, build_network(study), signed)

    with pytest.raises(IdentityError, match=r"not signed .* is used only with --allow-unsigned"):
        start(version)
    mine = tmp_path / "v1"
    publish(study, weights, None, mine, details={}, provenance=Provenance(signer=coordinator_of("tiny")))
    coordinator_of("other")
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(identities("other") / "authority" / "ca.crt"))
    with pytest.raises(IdentityError):
        start(mine)
    monkeypatch.setenv("WARDROUND_AUTHORITY", str(identities("tiny") / "authority" / "ca.crt"))
    found = start(mine)
    assert found is not None and found.origin["started_from"]["version"] == "v1"


def test_without_a_key_a_study_starts_from_its_seed(start: Callable[..., Any]) -> None:
    run, found = start(None)
    assert found is None
    assert not run.start.exists()


def test_a_version_gives_its_weights_and_is_named(start: Callable[..., Any], version: Path) -> None:
    _, found = start(version)
    published = open_weights(version)
    for mine, theirs in zip(found.weights, published.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert found.origin == {"started_from": {"study": "tiny", "version": "v1", "sha256": published.sha256}}
    assert found.study == published.study


def test_of_a_run_the_newest_version_is_taken(start: Callable[..., Any], version: Path, tmp_path: Path) -> None:
    copied = tmp_path / "other"
    shutil.copytree(version.parents[1], copied)
    shutil.copytree(version, copied / "published" / "v9")
    (copied / "published" / "v1" / "weights.tensors").unlink()
    _, found = start(copied)
    assert found.origin["started_from"]["study"] == "tiny"


def test_a_relative_path_is_relative_to_where_the_coordinator_starts(
    start: Callable[..., Any], version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(version.parent)
    assert start(Path("v1"))[1] is not None


def test_a_run_that_goes_on_needs_the_version_no_more(start: Callable[..., Any], version: Path, tmp_path: Path) -> None:
    copied = tmp_path / "v1"
    shutil.copytree(version, copied)
    run, first = start(copied)
    shutil.rmtree(copied)
    _, again = start(copied)
    assert again.origin == first.origin
    assert again.study == first.study
    for mine, theirs in zip(again.weights, open_weights(version).weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert kept_start(run, build_network(first.study)) is not None


def test_weights_of_another_size_are_refused_by_name(start: Callable[..., Any], version: Path) -> None:
    first = build_network(open_weights(version).study).specs[0]
    expected = rf"{first.name}: expected shape .*8\), found shape .*4\).*and \d+ more"
    with pytest.raises(StudyError, match=expected):
        start(version, model={"filters": 8})


def test_weights_that_are_there_on_one_side_alone_are_named(start: Callable[..., Any], version: Path) -> None:
    with pytest.raises(StudyError, match=r"expected none, found shape|expected shape .*, found none"):
        start(version, model={"name": "attention_unet"})


def test_another_number_of_classes_is_refused(start: Callable[..., Any], version: Path) -> None:
    last = build_network(open_weights(version).study).specs[-1]
    with pytest.raises(StudyError, match=rf"training.start_from: .*{last.name}: expected shape \(3,\)"):
        start(version, task={"classes": ("background", "cell", "other")})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("task", "classes", ("background", "nucleus")),
        ("task", "labels", "instances"),
        ("model", "normalization", "none"),
        ("model", "head", "distance"),
    ],
)
def test_weights_of_equal_shapes_that_mean_something_else_are_refused(
    start: Callable[..., Any], version: Path, section: str, key: str, value: Any
) -> None:
    with pytest.raises(StudyError, match=rf"training.start_from.*{section}\.{key}|expected none|found none"):
        start(version, **{section: {key: value}})


def test_weights_trained_with_other_dilations_are_refused(tiny_study: Callable[..., Study]) -> None:
    def with_patch(size: int) -> Study:
        study = tiny_study()
        model = dataclasses.replace(study.model, name="deeplabv3plus", encoder="mobilenetv3")
        preprocessing = dataclasses.replace(study.preprocessing, patch=(size, size))
        return dataclasses.replace(study, model=model, preprocessing=preprocessing)

    network = build_network(with_patch(256))
    weights = tuple(np.zeros(spec.shape, np.float32) for spec in network.specs)
    check_fits(with_patch(256), network, PublishedWeights(with_patch(257), "v1", weights, ""))
    with pytest.raises(StudyError, match=r"preprocessing\.patch \(its dilations\) is 3, 6, 9 here and 6, 12, 18 in"):
        check_fits(with_patch(256), network, PublishedWeights(with_patch(513), "v1", weights, ""))


def test_a_holdout_that_the_study_before_cannot_use_does_not_cost_the_publication(
    tmp_path: Path, tiny_study: Callable[..., Study], caplog: pytest.LogCaptureFixture
) -> None:
    study, folder = published_study(tiny_study), tmp_path / "holdout"
    for kind, array in (
        ("images", np.arange(256, dtype=np.uint8).reshape(16, 16)),
        ("labels", np.eye(16, dtype=np.uint8)),
    ):
        (folder / kind).mkdir(parents=True)
        tifffile.imwrite(folder / kind / "0-alpha.tif", array)
    run = RunFolder(tmp_path / "run")
    run.prepare(study)
    network = build_network(study)
    weights = [weight.numpy() for weight in network.initial_weights(7)]
    write_tensors(run.models / "000001.tensors", weights)
    before = dataclasses.replace(study, task=dataclasses.replace(study.task, channels=3, modalities=("a", "b", "c")))
    before = dataclasses.replace(before, preprocessing=dataclasses.replace(study.preprocessing, intensity="percentile"))
    start = Start(weights, {"started_from": {"study": "tiny", "version": "v1", "sha256": "ab" * 32}}, before)
    report = publish_round(
        study,
        run,
        1,
        0.5,
        Evaluated(study, folder),
        None,
        start,
        None,
        signer=coordinator_of(study.name),
        audit=NO_AUDIT,
    )
    assert report["publication"]["version"] == "v1" and report["holdout"]["cases"] == 1
    assert "continual" not in report and report["started_from"]["version"] == "v1"
    assert any("without the comparison" in record.getMessage() for record in caplog.records)


def test_a_damaged_version_is_refused(start: Callable[..., Any], version: Path, tmp_path: Path) -> None:
    copied = tmp_path / "v1"
    shutil.copytree(version, copied)
    content = bytearray((copied / "weights.tensors").read_bytes())
    content[-100] ^= 1
    (copied / "weights.tensors").write_bytes(content)
    with pytest.raises(PublishError, match="expected SHA-256"):
        start(copied)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_that_is_no_version_is_a_wrong_study(start: Callable[..., Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError, match=r"training\.start_from: .*neither the folder of a published version"):
        start(tmp_path / name)


def test_encoder_weights_are_taken_from_a_file_and_the_rest_from_the_seed(
    start: Callable[..., Any], tiny_study: Callable[..., Study], tmp_path: Path
) -> None:
    model = {"name": "mobilenetv3_small", "filters": 4, "encoder_weights": str(tmp_path / "encoder.npz")}
    study = tiny_study()
    network = build_network(dataclasses.replace(study, model=dataclasses.replace(study.model, **model)))
    encoder = {spec.name: np.full(spec.shape, 0.5, np.float32) for spec in network.specs if "encoder/" in spec.name}
    np.savez(tmp_path / "encoder.npz", **encoder)
    _, found = start(None, model=model)
    seeded = network.initial_weights(study.seed)
    for spec, weight, other in zip(network.specs, found.weights, seeded, strict=True):
        np.testing.assert_array_equal(weight, encoder.get(spec.name, other))
    assert found.origin["encoder_weights"]["weights"] == len(encoder)
    assert found.study is None


def test_the_card_says_what_was_gained_and_forgotten() -> None:
    classes = {"cell": {"before": 0.5, "after": 0.75}}
    comparison = {
        "new": {"cases": 4, "before": 0.5, "after": 0.75, "class": classes},
        "old": {"cases": 2, "before": 0.875, "after": math.nan, "class": classes},
        "forgetting": 0.125,
    }
    assert rows_of(comparison) == [
        ("new holdout", "4", "0.5000", "0.7500", "+0.2500"),
        ("old holdout", "2", "0.8750", "-", "-"),
    ]
    origin = {"study": "cells", "version": "v3", "sha256": "ab" * 32}
    text = "\n".join(card_section({"started_from": origin, "continual": comparison}))
    assert "weights of cells v3" in text
    assert "| new holdout | 4 | 0.5000 | 0.7500 | +0.2500 |" in text
    assert "minus after on it: +0.1250" in text
    assert card_section({"round": 3}) == []
