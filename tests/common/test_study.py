"""The study file: what is read, what is refused and how the refusal reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StudyError
from common.study import AUGMENTATIONS, DEFAULT_VARIANTS, Study, load_study, parse_study
from tests.common.studies import BASE, changed, problems

STUDIES = Path(__file__).parents[2] / "deploy" / "studies"

# What is read. ----------------------------------------------------------------------------------------------------


def test_absent_keys_have_the_documented_defaults() -> None:
    study = parse_study(BASE)
    assert (study.name, study.seed) == ("cells", 3)
    assert study.task.classes == ("background", "cell")
    assert study.task.foreground == ("cell",)
    assert (study.model.name, study.model.filters, study.model.depth) == ("unet", 16, 3)
    assert (study.model.head, study.model.normalization) == ("softmax", "weight")
    assert study.preprocessing.intensity == "zscore"
    assert study.preprocessing.patch == (96, 96)
    assert (study.preprocessing.spacing, study.preprocessing.window, study.preprocessing.crop) == (None, None, "none")
    assert (study.task.modalities, study.task.missing_modality, study.cohort.minimum_cases) == ((), "error", None)
    assert study.training.modality_dropout == 0.0
    assert study.augmentation == ("flip", "rotate", "scale", "gamma", "contrast", "noise")
    training = study.training
    assert (training.algorithm, training.proximal_mu, training.weighting) == ("fedavg", 0.0, "examples")
    assert (training.local_epochs, training.patches_per_epoch, training.batch_size) == (1, None, 8)
    assert (training.clip_norm, training.foreground_fraction, training.threads) == (None, 0.33, 1)
    assert (training.server_optimizer.name, training.server_optimizer.learning_rate) == ("sgd", 1.0)
    assert study.cohort.quorum == 2
    assert study.cohort.deadline_seconds == 3600.0
    assert (study.evaluation.validation_fraction, study.evaluation.overlap) == (0.2, 0.25)
    assert (study.evaluation.folds, study.evaluation.fold) == (None, 0)
    assert study.evaluation.holdout is True
    assert study.publishing.variants == DEFAULT_VARIANTS
    assert study.publishing.tile == (96, 96)
    assert (study.publishing.calibration_images, study.publishing.allowed_dice_loss) == (32, 0.01)


@pytest.mark.parametrize("section", ["", "  client_optimizer:\n"])
def test_absent_or_empty_client_optimizer_is_adam(section: str) -> None:
    text = changed("  client_optimizer:\n    name: adam\n    learning_rate: 1e-3\n", section)
    optimizer = parse_study(text).training.client_optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adam", 0.001)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (0.9, 0.999, 1e-7)
    assert (optimizer.schedule, optimizer.warmup_rounds) == ("constant", 0)


def test_section_with_every_key_commented_out_has_its_defaults() -> None:
    assert parse_study(BASE + "evaluation:\n  # overlap: 0.5\n") == parse_study(BASE)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.0e-3", 1e-3), (".5", 0.5), ("2", 2.0), ("+3.", 3.0)]
)
def test_floats_are_read_as_people_write_them(written: str, value: float) -> None:
    rate = parse_study(changed("1e-3", written)).training.client_optimizer.learning_rate
    assert isinstance(rate, float)
    assert rate == value


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("90s", 90.0), ("20m", 1200.0), ("2h", 7200.0), ("1h30m", 5400.0), ("1h0m1s", 3601.0), ("0.25s", 0.25)],
)
def test_deadline_is_a_duration(written: str, seconds: float) -> None:
    study = parse_study(BASE + f"  deadline: {written}\n")
    assert study.cohort.deadline_seconds == seconds
    assert json.loads(study.canonical())["cohort"]["deadline"] == seconds
    assert parse_study(study.to_yaml()) == study


def test_sites_are_held_in_the_order_updates_are_summed_in() -> None:
    assert parse_study(BASE).cohort.sites == ("east", "west")


def test_fedprox_has_a_proximal_term_and_fedavg_has_none() -> None:
    text = changed("  rounds: 24\n", "  rounds: 24\n  algorithm: fedprox\n")
    assert parse_study(text).training.proximal_mu == 0.01
    assert parse_study(text.replace("fedprox\n", "fedprox\n  proximal_mu: 2\n")).training.proximal_mu == 2.0
    assert "proximal_mu" not in json.loads(parse_study(BASE).canonical())["training"]


def test_optimizers_hold_only_what_their_method_has() -> None:
    text = changed("name: adam", "name: momentum").replace(
        "cohort:", "  server_optimizer: {name: yogi, learning_rate: 1}\ncohort:"
    )
    training = parse_study(text).training
    assert (training.client_optimizer.momentum, training.client_optimizer.beta_1) == (0.9, 0.0)
    server = training.server_optimizer
    assert (server.momentum, server.beta_1, server.beta_2, server.epsilon) == (0.0, 0.9, 0.99, 1e-3)


def test_augmentation_may_be_empty() -> None:
    assert parse_study(BASE + "augmentation: []\n").augmentation == ()


def test_tile_may_differ_from_the_patch() -> None:
    assert parse_study(BASE + "publishing:\n  tile: [256, 128]\n").publishing.tile == (256, 128)


def test_a_multi_modal_ct_study_survives_being_written_and_read() -> None:
    text = changed("labels: instances", "modalities: [CT, T1post, FLAIR]\n  missing_modality: zero")
    text = text.replace("patch:", "spacing: [1, 0.75]\n  intensity: window\n  window: [-160, 240]\n  patch:")
    study = parse_study(text)
    assert study.task.modalities == ("CT", "T1post", "FLAIR")
    assert (study.preprocessing.spacing, study.preprocessing.window) == ((1.0, 0.75), (-160.0, 240.0))
    assert parse_study(study.to_yaml()) == study


def test_folds_take_the_place_of_the_validation_fraction() -> None:
    study = parse_study(BASE + "evaluation: {folds: 5, fold: 4}\n")
    assert (study.evaluation.folds, study.evaluation.fold, study.evaluation.validation_fraction) == (5, 4, 0.2)
    assert "validation_fraction" not in study.to_yaml()
    assert parse_study(study.to_yaml()) == study
    assert "validation_fraction" not in json.loads(study.canonical())["evaluation"]
    other = parse_study(BASE + "evaluation: {folds: 5, fold: 3}\n")
    assert other.canonical() != study.canonical()


def test_a_study_without_folds_keeps_the_canonical_text_that_it_had_before_there_were_any() -> None:
    assert json.loads(parse_study(BASE).canonical())["evaluation"] == {
        "holdout": True,
        "overlap": 0.25,
        "validation_fraction": 0.2,
    }
    assert parse_study(BASE + "evaluation: {folds: null, fold: 0}\n") == parse_study(BASE)


def test_volumes_have_three_sizes() -> None:
    text = changed("dimensions: 2", "dimensions: 3").replace("[96, 96]", "[40, 56, 40]")
    assert parse_study(text).publishing.tile == (40, 56, 40)


# One meaning, one text. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 3", "seed:    3   # a comment"),
        ("1e-3", "0.001"),
        ("[west, east]", "[east, west]"),
        ("[west, east]", "\n  - 'west'\n  - \"east\""),
        ("  rounds: 24\n", "  rounds: 24\n  batch_size: 8\n  clip_norm: null\n  algorithm: fedavg\n"),
        ("[west, east]", "[west, east]\n  quorum: 2\n  deadline: 60m"),
        ("study: cells\nseed: 3\n", "seed: 3\nstudy: cells\n"),
        (
            "[west, east]",
            "[west, east]\npublishing: {tile: [96, 96], variants: [int8, float16, dynamic_range, float32]}",
        ),
        ("[west, east]", "[west, east]\naugmentation: [noise, contrast, gamma, scale, rotate, flip]"),
        ("\n", "\r\n"),
    ],
)
def test_studies_that_mean_the_same_have_the_same_canonical_text(old: str, new: str) -> None:
    text = BASE.replace(old, new)
    assert text != BASE
    assert parse_study(text).canonical() == parse_study(BASE).canonical()
    assert parse_study(text) == parse_study(BASE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 3", "seed: 4"),
        ("1e-3", "2e-3"),
        ("[west, east]", "[west, north]"),
        ("[west, east]", "[west, east]\n  quorum: 1"),
        ("  depth: 3", "  depth: 4"),
        ("[west, east]", "[west, east]\naugmentation: []"),
        ("name: adam", "name: sgd"),
    ],
)
def test_studies_that_differ_have_different_canonical_texts(old: str, new: str) -> None:
    assert parse_study(changed(old, new)).canonical() != parse_study(BASE).canonical()


def test_canonical_text_is_sorted_json_with_every_default() -> None:
    canonical = parse_study(BASE).canonical()
    tree = json.loads(canonical)
    assert canonical == json.dumps(tree, sort_keys=True, separators=(",", ":"))
    assert tree["study"] == "cells"
    assert tree["publishing"]["tile"] == [96, 96]
    assert tree["training"]["client_optimizer"]["epsilon"] == 1e-7
    assert "momentum" not in tree["training"]["client_optimizer"]


_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(
    lambda name: name.lower() != "holdout"
)
_CLASSES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)


@given(
    classes=st.lists(_CLASSES, min_size=1, max_size=4),
    sites=st.lists(_NAMES, min_size=1, max_size=5, unique=True),
    rate=st.floats(min_value=1e-12, max_value=1e6),
    milliseconds=st.integers(1, 720 * 3_600_000),
    augmentation=st.lists(st.sampled_from(AUGMENTATIONS), unique=True),
    optimizer=st.sampled_from(["sgd", "momentum", "adam"]),
)
def test_every_study_survives_being_written_and_read(
    classes: list[str],
    sites: list[str],
    rate: float,
    milliseconds: int,
    augmentation: list[str],
    optimizer: str,
) -> None:
    unique = [name for name in dict.fromkeys(classes) if name != "background"]
    tree = {
        "study": "s",
        "task": {"dimensions": 2, "channels": 1, "classes": ["background", *unique, "last one"]},
        "preprocessing": {"patch": [64, 64]},
        "augmentation": augmentation,
        "training": {"rounds": 1, "client_optimizer": {"name": optimizer, "learning_rate": rate}},
        "cohort": {"sites": sites, "deadline": f"{milliseconds / 1000:.3f}s"},
    }
    try:
        study = parse_study(json.dumps(tree, ensure_ascii=False))
    except StudyError as error:  # two spellings of one class name are one name after Unicode normalization
        assert "every name once" in str(error)
        return
    assert study.training.client_optimizer.learning_rate == rate
    assert study.cohort.deadline_seconds == milliseconds / 1000
    again = parse_study(study.to_yaml())
    assert again == study
    assert again.canonical() == study.canonical()


@given(text=st.text(max_size=60))
def test_any_text_is_a_study_or_a_study_error(text: str) -> None:
    with pytest.raises(StudyError, match=r"\(study:\d+\)"):
        parse_study(text)


@given(value=st.text(st.sampled_from("0123456789.eE+-_: x'\"[]{}#&*!\n \\"), max_size=12))
def test_any_value_is_read_or_refused(value: str) -> None:
    try:
        study = parse_study(BASE.replace("1e-3", value))
    except StudyError:
        return
    assert study.training.client_optimizer.learning_rate > 0


# What is refused. -------------------------------------------------------------------------------------------------

_OPTIMIZER = "training.client_optimizer"
_SITE = (
    "a site name of 1 to 63 letters, digits, _ . and - that starts with a letter or digit and is not "
    '"holdout", the coordinator\'s own folder'
)

BAD = [
    ("seed: 3", "seed: -1", "seed: expected an integer from 0 to 2147483647, found -1 (s.yaml:2)"),
    ("seed: 3", "seed: 2147483648", "seed: expected an integer from 0 to 2147483647, found 2147483648 (s.yaml:2)"),
    ("seed: 3", "seed: true", "seed: expected an integer from 0 to 2147483647, found true (s.yaml:2)"),
    ("rounds: 24", "rounds: -3", "training.rounds: expected a positive integer, found -3 (s.yaml:13)"),
    ("rounds: 24", "rounds: 0", "training.rounds: expected a positive integer, found 0 (s.yaml:13)"),
    ("rounds: 24", "rounds: 24.0", "training.rounds: expected a positive integer, found 24.0 (s.yaml:13)"),
    ("rounds: 24", 'rounds: "24"', 'training.rounds: expected a positive integer, found "24" (s.yaml:13)'),
    ("rounds: 24", "rounds: yes", "training.rounds: expected a positive integer, found yes (s.yaml:13)"),
    ("rounds: 24", "rounds: 1:30", "training.rounds: expected a positive integer, found 1:30 (s.yaml:13)"),
    ("rounds: 24", "rounds: 010", "training.rounds: expected a positive integer, found 010 (s.yaml:13)"),
    ("rounds: 24", "rounds:", "training.rounds: expected a positive integer, found nothing (s.yaml:13)"),
    ("rounds: 24", "rounds: [1]", "training.rounds: expected a positive integer, found [1] (s.yaml:13)"),
    ("rounds: 24", "rounds: {a: 1}", "training.rounds: expected a positive integer, found keys and values (s.yaml:13)"),
    ("rounds: 24", "rounds: 10001", "training.rounds: expected an integer from 1 to 10000, found 10001 (s.yaml:13)"),
    (
        "rounds: 24",
        "rounds: 24\n  threads: 65",
        "training.threads: expected an integer from 1 to 64, found 65 (s.yaml:14)",
    ),
    ("  rounds: 24\n", "", "training.rounds: missing; expected a positive integer (s.yaml:12)"),
    ("dimensions: 2", "dimensions: 4", "task.dimensions: expected 2 or 3, found 4 (s.yaml:4)"),
    ("dimensions: 2", "dimensions: two", "task.dimensions: expected 2 or 3, found two (s.yaml:4)"),
    ("channels: 3", "channels: 17", "task.channels: expected an integer from 1 to 16, found 17 (s.yaml:5)"),
    (
        "[background, cell]",
        "[cell, background]",
        'task.classes: expected "background" as the first class, found [cell, background] (s.yaml:6)',
    ),
    (
        "[background, cell]",
        "[background]",
        "task.classes: expected a list of 2 to 255 class names, background first, found [background] (s.yaml:6)",
    ),
    (
        "[background, cell]",
        "[background, cell, cell]",
        "task.classes[2]: expected every name once, found cell again (s.yaml:6)",
    ),
    (
        "[background, cell]",
        "[background, cell, wall]",
        "task.classes: expected exactly 2 classes, background and one foreground, with labels: instances, "
        "found [background, cell, wall] (s.yaml:6)",
    ),
    ("labels: instances", "labels: semantic", "task.labels: expected classes or instances, found semantic (s.yaml:7)"),
    (
        "depth: 3",
        "name: vnet",
        "model.name: expected unet, residual_unet, attention_unet, dilated_unet, deeplabv3plus or mobilenetv3_small, "
        "found vnet (s.yaml:9)",
    ),
    (
        "depth: 3",
        "depth: 3\n  encoder: xception",
        "model.encoder: expected no encoder with name: unet (it belongs to deeplabv3plus), found xception (s.yaml:10)",
    ),
    (
        "depth: 3",
        "depth: 3\n  encoder_weights: encoder.npz",
        "model.encoder_weights: expected no file with name: unet (it belongs to deeplabv3plus or mobilenetv3_small), "
        "found encoder.npz (s.yaml:10)",
    ),
    (
        "rounds: 24",
        "rounds: 24\n  personal: normalization",
        "training.personal: expected none unless model.normalization is batch, found normalization (s.yaml:14)",
    ),
    ("depth: 3", "depth: 7", "model.depth: expected an integer from 1 to 6, found 7 (s.yaml:9)"),
    ("depth: 3", "head: argmax", "model.head: expected softmax, sigmoid or distance, found argmax (s.yaml:9)"),
    (
        "[96, 96]",
        "[96, 100]",
        "preprocessing.patch: expected 2 sizes (y, x), each a multiple of 8 (2 to the power of model.depth), "
        "found [96, 100] (s.yaml:11)",
    ),
    (
        "[96, 96]",
        "[96, 96, 96]",
        "preprocessing.patch: expected 2 sizes (y, x), each a multiple of 8 (2 to the power of model.depth), "
        "found [96, 96, 96] (s.yaml:11)",
    ),
    ("[96, 96]", "[96, 0]", "preprocessing.patch[1]: expected a positive integer, found 0 (s.yaml:11)"),
    (
        "[96, 96]",
        "96",
        "preprocessing.patch: expected a list of 2 to 3 sizes in voxels, ordered (z,) y, x, found 96 (s.yaml:11)",
    ),
    (
        "rounds: 24",
        "rounds: 24\n  proximal_mu: 0.1",
        "training.proximal_mu: expected no value with algorithm: fedavg (it belongs to fedprox), found 0.1 (s.yaml:14)",
    ),
    (
        "rounds: 24",
        "rounds: 24\n  algorithm: fedprox\n  proximal_mu: 0",
        "training.proximal_mu: expected a number above 0, found 0 (s.yaml:15)",
    ),
    ("1e-3", "0", f"{_OPTIMIZER}.learning_rate: expected a number above 0, found 0 (s.yaml:16)"),
    ("1e-3", ".inf", f"{_OPTIMIZER}.learning_rate: expected a number above 0, found .inf (s.yaml:16)"),
    ("1e-3", "1e999", f"{_OPTIMIZER}.learning_rate: expected a number above 0, found 1e999 (s.yaml:16)"),
    ("1e-3", ".nan", f"{_OPTIMIZER}.learning_rate: expected a number above 0, found .nan (s.yaml:16)"),
    ("1e-3", "true", f"{_OPTIMIZER}.learning_rate: expected a number above 0, found true (s.yaml:16)"),
    ("    learning_rate: 1e-3\n", "", f"{_OPTIMIZER}.learning_rate: missing; expected a number above 0 (s.yaml:14)"),
    (
        "learning_rate: 1e-3",
        "learning_rate: 1e-3\n    momentum: 0.9",
        f"{_OPTIMIZER}.momentum: expected no value with name: adam (it belongs to momentum), found 0.9 (s.yaml:17)",
    ),
    (
        "learning_rate: 1e-3",
        "learning_rate: 1e-3\n    beta_1: 1",
        f"{_OPTIMIZER}.beta_1: expected a number of at least 0 and below 1, found 1 (s.yaml:17)",
    ),
    (
        "learning_rate: 1e-3",
        "learning_rate: 1e-3\n    warmup_rounds: 24",
        f"{_OPTIMIZER}.warmup_rounds: expected fewer than the 24 of training.rounds, found 24 (s.yaml:17)",
    ),
    ("name: adam", "name: yogi", f"{_OPTIMIZER}.name: expected sgd, momentum or adam, found yogi (s.yaml:15)"),
    (
        "cohort:",
        "  server_optimizer: {name: sgd, learning_rate: 1, schedule: cosine}\ncohort:",
        "training.server_optimizer.schedule: unknown key; did you mean training.client_optimizer.schedule? "
        "Known here: name, learning_rate, momentum, beta_1, beta_2, epsilon (s.yaml:17)",
    ),
    (
        "[west, east]",
        "[]",
        "cohort.sites: expected a list of 1 to 50 site names, found [] (s.yaml:18)",
    ),
    ("[west, east]", "[west, west]", "cohort.sites[1]: expected every name once, found west again (s.yaml:18)"),
    (
        "[west, east]",
        "[west, holdout]",
        f"cohort.sites[1]: expected {_SITE}, found holdout (s.yaml:18)",
    ),
    (
        "[west, east]",
        "[west, ../east]",
        f"cohort.sites[1]: expected {_SITE}, found ../east (s.yaml:18)",
    ),
    (
        "[west, east]",
        "[west, no]",
        f'cohort.sites[1]: expected {_SITE} (write "no", in quotes, if it is one), found no (s.yaml:18)',
    ),
    (
        "[west, east]",
        "[west, east]\n  quorum: 3",
        "cohort.quorum: expected at most 2, the number of sites, found 3 (s.yaml:19)",
    ),
    ("[west, east]", "[west, east]\n  quorum: 0", "cohort.quorum: expected a positive integer, found 0 (s.yaml:19)"),
    *(
        (
            "[west, east]",
            f"[west, east]\n  deadline: {deadline}",
            "cohort.deadline: expected a duration such as 90s, 20m or 1h30m, above 0 and of at most 720h, "
            f"found {shown} (s.yaml:19)",
        )
        for deadline, shown in [
            ("90", "90"),
            ("0s", "0s"),
            ("30m1h", "30m1h"),
            ("1:30", "1:30"),
            ("-5m", "-5m"),
            ("721h", "721h"),
            ("1 day", "1 day"),
            ('""', "''"),
        ]
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation: {validation_fraction: 1}",
        "evaluation.validation_fraction: expected a number of at least 0 and below 1, found 1 (s.yaml:19)",
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation: {folds: 1}",
        "evaluation.folds: expected an integer from 2 to 20, found 1 (s.yaml:19)",
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation: {folds: 3, fold: 3}",
        "evaluation.fold: expected 0 to 2, one of evaluation.folds, found 3 (s.yaml:19)",
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation: {fold: 1}",
        "evaluation.fold: expected 0 where evaluation.folds is null, found 1 (s.yaml:19)",
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation: {folds: 3, validation_fraction: 0.2}",
        "evaluation.validation_fraction: expected no value with folds: 3 (it belongs to folds: null), "
        "found 0.2 (s.yaml:19)",
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation:\n  overlap: 0.95",
        "evaluation.overlap: expected a number of at least 0 and of at most 0.9, found 0.95 (s.yaml:20)",
    ),
    (
        "[west, east]",
        "[west, east]\nevaluation:\n  holdout: 1",
        "evaluation.holdout: expected true or false, found 1 (s.yaml:20)",
    ),
    (
        "[west, east]",
        "[west, east]\npublishing:\n  variants: [int8]",
        "publishing.variants: expected float32 among the variants (the others are measured against it), "
        "found [int8] (s.yaml:20)",
    ),
    (
        "[west, east]",
        "[west, east]\npublishing:\n  tile: [100, 96]",
        "publishing.tile: expected 2 sizes (y, x), each a multiple of 8 (2 to the power of model.depth), "
        "found [100, 96] (s.yaml:20)",
    ),
    (
        "[west, east]",
        "[west, east]\naugmentation: [flip, warp]",
        "augmentation[1]: expected flip, rotate, scale, gamma, contrast, noise, blur, elastic, brightness, "
        "contrast_stretch, gamma_inverted, low_resolution, color_jitter, illumination or cutout, "
        "found warp (s.yaml:19)",
    ),
    (
        "[west, east]",
        "[west, east]\naugmentation:",
        "augmentation: expected a list of augmentations ([] for none), found nothing (s.yaml:19)",
    ),
    (
        "study: cells",
        "study: Cells!",
        "study: expected a name of 1 to 63 lower-case letters, digits, - and _ that starts with a letter or digit, "
        "found Cells! (s.yaml:1)",
    ),
    (
        "rounds: 24",
        "rounds: 24\n  rounds: 25",
        "training.rounds: given twice, first in line 13; remove one (s.yaml:14)",
    ),
    ("seed: 3", "seed: 3\nseed: 3", "seed: given twice, first in line 2; remove one (s.yaml:3)"),
    ("depth: 3", "depth: 3\n  <<: {filters: 4}", "model.<<: merge keys are not read; write the keys out (s.yaml:10)"),
    (
        "depth: 3",
        "detph: 3",
        "model.detph: unknown key; did you mean depth? "
        "Known here: name, filters, depth, head, normalization, encoder, encoder_weights (s.yaml:9)",
    ),
    (
        "depth: 3",
        "depth: 3\n  [a, b]: 1",
        "model.[a, b]: unknown key. Known here: name, filters, depth, head, normalization, "
        "encoder, encoder_weights (s.yaml:10)",
    ),
    (
        "seed: 3",
        "rounds: 3",
        "rounds: unknown key; did you mean training.rounds? Known here: study, seed, task, model, preprocessing, "
        "augmentation, training, cohort, evaluation, publishing, privacy, secure_aggregation (s.yaml:2)",
    ),
    (
        "model:\n  depth: 3",
        "model: unet",
        "model: expected keys and values (name, filters, depth, head, normalization, "
        "encoder, encoder_weights), found unet (s.yaml:8)",
    ),
    (
        "labels: instances",
        "modalities: [CT, MR]",
        "task.channels: expected 2, one channel for each of task.modalities, found 3 (s.yaml:5)",
    ),
    (
        "rounds: 24",
        "rounds: 24\n  modality_dropout: 0.2",
        "training.modality_dropout: expected 0 where task.modalities names fewer than two, found 0.2 (s.yaml:14)",
    ),
    (
        "patch: [96, 96]",
        "patch: [96, 96]\n  spacing: [1, 1, 1]",
        "preprocessing.spacing: expected 2 distances (y, x), or null, found [1, 1, 1] (s.yaml:12)",
    ),
    (
        "patch: [96, 96]",
        "patch: [96, 96]\n  spacing: [1, 0]",
        "preprocessing.spacing[1]: expected a number above 0 and of at most 1e+06, found 0 (s.yaml:12)",
    ),
    (
        "patch: [96, 96]",
        "patch: [96, 96]\n  intensity: window",
        "preprocessing.intensity: expected a window of two values with intensity: window, and with no other, "
        "found window (s.yaml:12)",
    ),
    (
        "patch: [96, 96]",
        "patch: [96, 96]\n  window: [0, 100]",
        "preprocessing.window: expected a window of two values with intensity: window, and with no other, "
        "found [0, 100] (s.yaml:12)",
    ),
    (
        "patch: [96, 96]",
        "patch: [96, 96]\n  intensity: window\n  window: [240, -160]",
        "preprocessing.window: expected the lower value first, found [240, -160] (s.yaml:13)",
    ),
    (
        "cohort:\n  sites: [west, east]\n",
        "",
        "cohort: missing; expected keys and values (sites, quorum, deadline, minimum_cases) (s.yaml:1)",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[message.split(" (s.yaml")[0][:70] for *_, message in BAD])
def test_bad_study_is_refused_with_key_and_line(old: str, new: str, message: str) -> None:
    assert problems(changed(old, new)) == [message]


def test_everything_wrong_is_reported_at_once_in_the_order_of_the_file() -> None:
    text = BASE.replace("seed: 3", "sede: 3").replace("channels: 3", "channels: no").replace("24", "-3")
    text = text.replace("[west, east]", "[holdout, west, west]")
    assert [(line.split(":")[0], line.rsplit(":", 1)[1]) for line in problems(text)] == [
        ("sede", "2)"),
        ("task.channels", "5)"),
        ("training.rounds", "13)"),
        ("cohort.sites[0]", "18)"),
        ("cohort.sites[2]", "18)"),
    ]


@pytest.mark.parametrize(
    ("text", "start", "line"),
    [
        ("", "study file: expected keys and values (study, seed, task,", 1),
        ("# only a comment\n", "study file: expected keys and values (study, seed, task,", 1),
        ("- study: cells\n", "study file: expected keys and values", 1),
        ("\njust words\n", "study file: expected keys and values", 2),
        ("study: cells\nseed: [1, 2\ntask: 3\n", "study file: not readable as YAML: ", 3),
        ("study: cells\n\tseed: 1\n", "study file: not readable as YAML: ", 2),
        ("study: cells\n---\nstudy: cells\n", "study file: not readable as YAML: expected a single document", 2),
        ("study: cells\ntask: &a\n  dimensions: 2\n", "study file: not readable as YAML: anchors, aliases and tags", 2),
        ("study: cells\ntask: *a\n", "study file: not readable as YAML: anchors, aliases and tags", 2),
        ("study: &a [*a]\n", "study file: not readable as YAML: anchors, aliases and tags", 1),
        (
            "study: cells\nseed: !!python/name:os.system 3\n",
            "study file: not readable as YAML: anchors, aliases and",
            2,
        ),
        ('study: cells\nseed: "\\UFFFFFFFF"\n', "study file: not readable as YAML: an escape", 2),
        ("study: cells\nseed: \x00\n", "study file: not readable as YAML: the character '\\x00' is not allowed", 2),
        ("[" * 100_000, "study file: not readable as YAML: nested too deeply", 1),
        ("%YAML 9.9\n---\nstudy: cells\n", "study file: not readable as YAML: ", 1),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_not_a_mapping_of_keys_is_refused_with_its_line(text: str, start: str, line: int) -> None:
    (message,) = problems(text)
    assert message.startswith(start)
    assert message.endswith(f"(s.yaml:{line})")


def test_long_values_are_shortened_in_messages() -> None:
    (message,) = problems(changed("rounds: 24", f"rounds: {'9' * 5000}"))
    assert len(message) < 200


# Files. -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_file_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "nuclei.yaml"
    path.write_text(changed("rounds: 24", "rounds: -3"), encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load_study(path)
    assert str(caught.value) == f"training.rounds: expected a positive integer, found -3 ({path}:13)"


def test_file_that_is_missing_or_a_folder_is_a_study_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(StudyError, match=r"^study file: cannot be read: ") as caught:
            load_study(path)
        assert str(path) in str(caught.value)


def test_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"study: cells\nseed: 3 # M\xfcnster\n")
    with pytest.raises(StudyError, match=r"expected UTF-8 text") as caught:
        load_study(path)
    assert str(caught.value).endswith(f"({path}:2)")


def test_byte_order_mark_is_no_part_of_the_study(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_study(path) == parse_study(BASE)


@pytest.mark.parametrize("name", ["nuclei", "hippocampus", "brain_tumour"])
def test_example_study_is_valid_and_survives_being_written(name: str) -> None:
    study = load_study(STUDIES / f"{name}.yaml")
    assert isinstance(study, Study)
    assert study.name == name.replace("_", "-")
    assert study.cohort.quorum == max(len(study.cohort.sites) - 1, 2)
    assert parse_study(study.to_yaml()) == study


def test_reading_a_study_loads_no_tensorflow() -> None:
    code = "import sys, common.study; sys.exit(any(name.startswith(('tensorflow', 'numpy')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
