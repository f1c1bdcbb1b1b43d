"""Facts of a case, and what shows when cases lie beside each other."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import DataError
from common.imaging.case import Case, Source
from common.imaging.checks import (
    CaseFacts,
    Code,
    Requirements,
    enough_cases,
    examine_case,
    examine_cases,
    kept_out,
)
from common.imaging.facts import digest_of, image_facts, statistics_of, value_counts
from common.imaging.grid_checks import overlap, same_grid
from common.imaging.loading import load_case
from common.imaging.resampling import Zoom
from common.imaging.thumbnail import thumbnail
from common.imaging.volume import Volume, scaling_affine
from common.study import parse_study

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "checks.md"
THREE = Requirements(3, 1, ("background", "organ", "lesion"), "classes")


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"needs ../shared/data/{folder}")


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Source:
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.eye(4) if affine is None else affine), path)
    return Source(path)


def make_case(folder: Path, name: str, seed: int, *, spacing: float = 1.0, gain: float = 1.0, label: int = 1) -> Case:
    rng = np.random.default_rng(seed)
    image = (rng.normal(100, 20, (6, 12, 10)) * gain).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[2:4, 3:8, 2 + seed % 5 : 9] = label
    mask[0, seed // 10, seed % 10] = label
    affine = np.diag([1, 1, spacing, 1.0])
    return Case(
        name,
        name,
        {"": nifti(folder / f"{name}.nii.gz", image, affine)},
        nifti(folder / f"{name}_seg.nii.gz", mask, affine),
    )


def facts_of(case: Case, **options: object) -> CaseFacts:
    facts, _ = examine_case(case, **options)  # type: ignore[arg-type]
    assert facts is not None
    return facts


# Facts of one case


def test_facts_say_what_is_in_the_files(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", 3, spacing=2.5)
    facts, findings = examine_case(case, THREE)
    assert facts is not None and findings == []
    image, label = facts.images[""], facts.label
    assert label is not None
    array = nib.load(case.images[""].path).get_fdata(dtype=np.float64)
    assert (image.format, image.dtype, image.channels, image.shape) == ("NIfTI", "float32", 1, (6, 12, 10))
    assert image.spacing == (2.5, 1.0, 1.0)
    assert image.affine == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 2.5, 0), (0, 0, 0, 1))
    found = [image.minimum, image.maximum, image.mean, image.std, image.p01, image.p99]
    expected = [array.min(), array.max(), array.mean(), array.std(), *np.percentile(array, (1, 99))]
    assert found == pytest.approx(expected, rel=1e-6)
    assert label.counts == {0: 6 * 12 * 10 - 41, 1: 41}  # 2 x 5 x 4 and one more
    assert (label.values, label.foreground, label.components) == (2, 41, 2)
    assert set(facts.digests) == {"image", "label"}
    assert facts.digests["image"] == digest_of([case.images[""].path])


def test_facts_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    facts = facts_of(make_case(tmp_path, "a", 1))
    assert CaseFacts.from_json(json.loads(json.dumps(facts.to_json(), allow_nan=False))) == facts
    without = replace(facts, label=None)
    assert CaseFacts.from_json(json.loads(json.dumps(without.to_json()))) == without


def test_file_digest_tells_files_and_pixel_digest_tells_images(tmp_path: Path) -> None:
    array = np.arange(720, dtype=np.int16).reshape(6, 12, 10)
    plain, packed = (facts_of(Case("a", "a", {"": nifti(tmp_path / f"a.{s}", array)}, None)) for s in ("nii", "nii.gz"))
    assert plain.images[""].digest != packed.images[""].digest
    assert plain.images[""].pixels == packed.images[""].pixels
    other = facts_of(Case("b", "b", {"": nifti(tmp_path / "b.nii", array.astype(np.int32))}, None))
    assert other.images[""].pixels != plain.images[""].pixels


def test_digest_of_a_series_does_not_depend_on_names_and_order(tmp_path: Path) -> None:
    for folder, names in (("a", "xyz"), ("b", "zxy")):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, (b"1", b"22", b"333"), strict=True):
            (tmp_path / folder / name).write_bytes(content)
    first, second = (sorted((tmp_path / folder).iterdir()) for folder in "ab")
    assert digest_of(first) == digest_of(second)
    second[0].write_bytes(b"another")
    assert digest_of(first) != digest_of(second)


ARRAYS = hnp.arrays(np.int32, hnp.array_shapes(min_dims=4, max_dims=4, max_side=6), elements=st.integers(0, 2**31 - 1))


@given(ARRAYS)
def test_values_are_counted_as_numpy_does(array: np.ndarray) -> None:
    values, counts = np.unique(array, return_counts=True)
    expected = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert value_counts(array) == expected
    assert list(value_counts(array)) == sorted(expected)
    small = array % 5
    assert sum(value_counts(small).values()) == small.size and set(value_counts(small)) <= set(range(5))


@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=4, max_dims=4, max_side=7)))
def test_statistics_are_those_of_float64(array: np.ndarray) -> None:
    found = statistics_of(array)
    assert found["mean"] == pytest.approx(array.mean(dtype=np.float64), rel=1e-12)
    assert found["std"] == pytest.approx(array.std(dtype=np.float64), rel=1e-9, abs=1e-9)
    assert (found["minimum"], found["maximum"]) == (array.min(), array.max())


def test_statistics_of_large_16_bit_images_do_not_drift() -> None:
    """float32 sums of this image are off in the fourth digit; percentiles come from every third voxel."""
    array = np.random.default_rng(0).integers(60_000, 60_004, (1, 2000, 2001, 1)).astype(np.uint16)
    found = statistics_of(array)
    assert found["mean"] == pytest.approx(60_001.5, abs=5e-3)
    assert found["std"] == pytest.approx(np.sqrt(1.25), abs=5e-3)
    assert (found["p01"], found["p99"]) == (60_000, 60_003)


def test_facts_are_geometry_without_the_memory_of_voxels(tmp_path: Path) -> None:
    spacing = (3.0, 0.5, 0.5)
    volume = Volume(np.ones((4, 5, 6, 1), np.uint8), spacing, scaling_affine(spacing))
    (tmp_path / "a.nii").touch()
    facts = image_facts(volume, Source(tmp_path / "a.nii"), [tmp_path / "a.nii"])
    huge = replace(facts, shape=(5000, 5000, 5000))
    assert huge.volume.shape == (5000, 5000, 5000)
    assert same_grid(huge, huge) and not same_grid(huge, facts)
    assert overlap(facts, huge) == 1.0


@given(st.tuples(*[st.floats(-12, 12)] * 3), st.floats(0.4, 2.5))
@settings(max_examples=60)
def test_overlap_is_the_share_of_voxels_within(shift: tuple[float, ...], zoom: float) -> None:
    spacing = (1.0, 1.0, 1.0)
    volume = Volume(np.ones((8, 9, 10, 1), np.uint8), spacing, scaling_affine(spacing))
    facts = image_facts(volume, Source(Path(__file__)), [Path(__file__)])
    affine = np.diag([zoom, zoom, zoom, 1.0])
    affine[:3, 3] = shift
    other = replace(facts, spacing=(zoom,) * 3, affine=tuple(tuple(row) for row in affine.tolist()))
    sides = [
        sum(begin - zoom * 0.5 <= i <= begin + zoom * (n - 0.5) for i in range(n)) / n
        for n, begin in zip((10, 9, 8), shift, strict=True)
    ]
    assert overlap(facts, other) == pytest.approx(np.prod(sides), abs=1e-12)


# Modalities, labels and the study


def two_modalities(folder: Path) -> Case:
    """The label is on the grid of T2."""
    fine, coarse = np.eye(4), np.diag([2.0, 2, 2, 1])
    fine[:3, 3] = coarse[:3, 3] = 7
    rng = np.random.default_rng(0)
    label = np.zeros((6, 6, 6), np.uint8)
    label[2:4, 2:4, 2:4] = 1
    return Case(
        "a",
        "a",
        {
            "T1": nifti(folder / "t1.nii", rng.normal(size=(12, 12, 12)).astype(np.float32), fine),
            "T2": nifti(folder / "t2.nii", rng.normal(size=(6, 6, 6)).astype(np.float32), coarse),
        },
        nifti(folder / "label.nii", label, coarse),
    )


def test_label_may_be_on_any_image_but_must_be_on_the_studys_first(tmp_path: Path) -> None:
    case = two_modalities(tmp_path)
    first_t1 = Requirements(3, 2, ("background", "organ"), "classes", ("T1", "T2"))
    first_t2 = replace(first_t1, modalities=("T2", "T1"))
    codes = [{finding.code for finding in examine_case(case, asked)[1]} for asked in (None, first_t1, first_t2)]
    assert codes == [{"W321"}, {"W321", "E205"}, {"W321"}]


def test_modalities_that_the_study_does_not_name_are_not_read(tmp_path: Path) -> None:
    case = two_modalities(tmp_path)
    (tmp_path / "t1.nii").write_bytes(b"damaged")
    facts, findings = examine_case(case, Requirements(3, 1, ("background", "organ"), "classes", ("T2",)))
    assert findings == [] and facts is not None and set(facts.images) == {"T2"}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.011, 0.011, 0.011), (0.008, 0.008, 0.008), (1e-3, 1e-3, 1e-3)])
def test_case_is_too_large_at_the_studys_spacing_where_preparing_refuses_it(
    tmp_path: Path, spacing: tuple[float, ...]
) -> None:
    """6 x 12 x 10 voxels of 1 mm are 0.5 and 1.4 times the most voxels at 0.011 and 0.008 mm."""
    case = make_case(tmp_path, "a", 1)
    study = parse_study(
        "study: t\ntask: {dimensions: 3, channels: 1, classes: [background, organ, lesion]}\n"
        f"preprocessing: {{patch: [16, 16, 16], spacing: {list(spacing)}}}\n"
        "training: {rounds: 1}\ncohort: {sites: [alpha]}\n"
    )
    _, findings = examine_case(case, Requirements.of(study))
    is_prepared = True
    try:
        # What preparing begins with; the voxels would fill the memory.
        Zoom.to_spacing((6, 12, 10), (1.0, 1.0, 1.0), spacing)
    except DataError:
        is_prepared = False
        with pytest.raises(DataError, match="would become"):
            load_case(case, study)
    assert [finding.code for finding in findings] == ([] if is_prepared else ["E117"])
    if findings:
        assert re.match(r"image a\.nii\.gz: resampled from 1, 1, 1 to .* an image of 6 x 12 x 10", findings[0].message)
        assert kept_out(findings) == {"a"}
    assert examine_case(case)[1] == []


def test_spacing_of_a_plane_is_judged_in_the_plane_and_of_modalities_the_first(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.arange(400, dtype=np.uint16).reshape(20, 20))
    plane = Case("a", "a", {"": Source(tmp_path / "a.tif")}, None)
    asked = Requirements(2, 1, ("background", "cell"), "instances", spacing=(1e-3, 1e-3))
    assert [finding.code for finding in examine_case(plane, asked)[1]] == ["E201"], "4e8 pixels are taken"
    assert "E117" in {f.code for f in examine_case(plane, replace(asked, spacing=(1e-4, 1e-4)))[1]}
    first, second = ({"T1": 1.0, "T2": 1000.0}, {"T1": 1000.0, "T2": 1.0})
    for number, sizes in enumerate((first, second)):
        images = {
            name: nifti(
                tmp_path / f"{number}{name}.nii",
                np.random.default_rng(number).integers(0, 99, (6, 6, 6)).astype(np.int16),
                np.diag([size, size, size, 1.0]),
            )
            for name, size in sizes.items()
        }
        asked = Requirements(3, 2, ("background", "organ"), "classes", ("T1", "T2"), spacing=(1.0, 1.0, 1.0))
        codes = [finding.code for finding in examine_case(Case("b", "b", images, None), asked)[1]]
        assert codes.count("E117") == number


def test_a_missing_modality_is_told_beside_what_the_case_has(tmp_path: Path) -> None:
    case = two_modalities(tmp_path)
    asked = Requirements(3, 3, ("background", "organ"), "classes", ("T1", "T2", "T1post"), "zero")
    (finding,) = [f for f in examine_case(case, asked, registered=["T1CE", "T1", "t2"])[1] if f.code == "W320"]
    assert finding.message == "case a: expected T1post; the case has T1, T1CE, t2, of which T1CE is not used"
    assert finding.advice.startswith(
        "Register the data again with --channel-map 'T1post=PATTERN' if it is one of these"
    )
    (finding,) = [f for f in examine_case(case, replace(asked, missing_modality="error"))[1] if f.code == "E301"]
    assert finding.message == "case a: expected T1post; the case has T1, T2"
    assert finding.advice == Code.MISSING_MODALITY.advice


def test_a_case_of_several_modalities_in_a_study_that_names_none_is_told_so(tmp_path: Path) -> None:
    case = two_modalities(tmp_path)
    _, findings = examine_case(case.with_modalities(()), THREE, registered=case.images)
    assert [finding.code for finding in findings] == ["E301"]
    assert "takes one image without a name, the case has 2 modalities (T1, T2)" in findings[0].message


@pytest.mark.parametrize("requirements", [None, Requirements(3, 1, ("background", "cell"), "instances")])
def test_an_image_taken_for_a_label_is_told_and_touching_objects_are_not(
    tmp_path: Path, requirements: Requirements | None
) -> None:
    rng = np.random.default_rng(0)
    image = nifti(tmp_path / "a.nii", rng.normal(100, 20, (8, 24, 24)).astype(np.float32))
    grey = rng.integers(1, 400, (8, 24, 24)).astype(np.int16)
    cells = np.arange(8 * 6 * 6).reshape(8, 6, 6).repeat(4, 1).repeat(4, 2).astype(np.int16)  # wall to wall
    codes = [
        {f.code for f in examine_case(Case("a", "a", {"": image}, nifti(tmp_path / "b.nii", label)), requirements)[1]}
        for label in (grey, cells)
    ]
    assert codes == [{"W224"}, set()]


def test_of_cases_that_are_kept_out_nothing_is_warned(tmp_path: Path) -> None:
    cases = [facts_of(make_case(tmp_path, f"c{i}", i)) for i in range(8)]
    bright = facts_of(make_case(tmp_path, "z", 9, gain=40))
    assert [finding.code for finding in examine_cases([*cases, bright])] == ["W422"]
    assert examine_cases([*cases, bright], out={"z"}) == []
    label = cases[0].label
    same = [*cases[:2], replace(bright, label=label)]
    assert [finding.case for finding in examine_cases(same)] == ["c0", "z"]
    assert examine_cases(same, out={"z"}) == []


def test_of_copies_it_is_said_which_stays(tmp_path: Path) -> None:
    facts = facts_of(make_case(tmp_path, "b", 0))
    (finding,) = examine_cases([replace(facts, name="a"), facts])
    assert finding.message == "case b: image and label are those of a, which stays"


def test_numbers_agree_with_their_nouns() -> None:
    assert enough_cases(0, 3, 1)[0].message == "the study asks for at least 1 sound case, found 0"
    assert enough_cases(0, 1, None)[0].message == "the study asks for the one case to be sound, found 0"


def test_label_map_decides_what_is_foreground_and_what_is_known(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", 0, label=4)
    assert {f.code for f in examine_case(case, THREE)[1]} == {"E204"}
    facts, findings = examine_case(case, THREE, {4: 1})
    assert findings == [] and facts is not None and facts.label is not None and facts.label.foreground > 0
    assert {f.code for f in examine_case(case, THREE, {4: 0})[1]} == {"W220"}
    assert {f.code for f in examine_case(case, THREE, {4: 3})[1]} == {"E204"}
    assert {f.code for f in examine_case(case, THREE, {1: 1})[1]} == {"E204"}


def test_facts_are_none_where_a_file_could_not_be_read(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", 0)
    assert case.label is not None
    case.label.path.write_bytes(b"")
    facts, findings = examine_case(case, THREE)
    assert facts is None and [finding.code for finding in findings] == ["E104"]


def test_without_a_study_a_label_drawn_on_any_of_the_images_is_sound(tmp_path: Path, write_series: Writer) -> None:
    fine, coarse = np.diag([1.0, 1, 2, 1]), np.diag([2.0, 2, 4, 1])
    fine[:3, 3], coarse[:3, 3] = (-3, -4, 5), (-2.5, -3.5, 6)
    rng = np.random.default_rng(0)
    arrays = {
        "T1": (rng.integers(0, 99, (4, 8, 8)).astype(np.int16), fine),
        "T2": (rng.integers(0, 99, (2, 4, 4)).astype(np.int16), coarse),
        "mask": (np.arange(32, dtype=np.int16).reshape(2, 4, 4) // 16, coarse),
    }
    for name, (array, affine) in arrays.items():
        (tmp_path / name).mkdir()
        write_series(tmp_path / name, array, affine)
    case = Case("a", "a", {name: Source(tmp_path / name) for name in ("T1", "T2")}, Source(tmp_path / "mask"))
    facts, findings = examine_case(case)
    assert [finding for finding in findings if finding.level == "error"] == []
    assert facts is not None and facts.label is not None and facts.label.shape == (2, 4, 4)
    asked = Requirements(3, 2, ("background", "organ"), "classes", ("T1", "T2"))
    assert kept_out(examine_case(case, asked)[1]) == {"a"}
    nowhere = replace(case, images={"T1": case.images["T1"]})
    assert kept_out(examine_case(nowhere)[1]) == {"a"}


@given(st.permutations([0, 1, 2]), st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3))
@settings(max_examples=20)
def test_pixel_digest_is_that_of_the_image_whichever_way_it_is_stored(axes: list[int], signs: list[int]) -> None:
    array = np.arange(4 * 3 * 2, dtype=np.int16).reshape(4, 3, 2)
    stored = nib.Nifti1Image(array, np.diag([1.0, 2, 3, 1]))
    turned = stored.as_reoriented(np.column_stack([axes, signs]))
    with tempfile.TemporaryDirectory() as folder:
        digests = []
        for name, image in (("ras.nii", stored), ("other.nii", turned)):
            nib.save(image, Path(folder) / name)
            facts = facts_of(Case(name, name, {"": Source(Path(folder) / name)}, None))
            digests.append(facts.images[""].pixels)
    assert digests[0] == digests[1]


# Across cases


def test_outliers_of_intensity_are_told_and_ordinary_cases_are_not(tmp_path: Path) -> None:
    cases = [facts_of(make_case(tmp_path, f"c{i}", i, gain=1 + 0.02 * (i % 4))) for i in range(9)]
    assert examine_cases(cases) == []
    bright = facts_of(make_case(tmp_path, "bright", 20, gain=10))
    findings = examine_cases([*cases, bright])
    assert [(finding.code, finding.case) for finding in findings] == [("W422", "bright")]
    assert examine_cases([*cases[:6], bright]) == [], "too few to say what is ordinary"


def test_outliers_of_spacing_are_told(tmp_path: Path) -> None:
    cases = [facts_of(make_case(tmp_path, f"c{i}", i, spacing=1 + 0.1 * (i % 3))) for i in range(9)]
    odd = facts_of(make_case(tmp_path, "odd", 20, spacing=5.0))
    findings = examine_cases([*cases, odd])
    assert [(finding.code, finding.case) for finding in findings] == [("W423", "odd")]


def test_of_copies_the_first_with_a_label_stays(tmp_path: Path) -> None:
    facts = facts_of(make_case(tmp_path, "b", 0))
    copies = [replace(facts, name="a", label=None), facts, replace(facts, name="c")]
    assert kept_out(examine_cases(copies)) == {"a", "c"}


def test_empty_labels_are_an_error_only_where_all_are(tmp_path: Path) -> None:
    empty = [facts_of(make_case(tmp_path, f"e{i}", i, label=0)) for i in range(2)]
    full = facts_of(make_case(tmp_path, "f", 5))
    (finding,) = examine_cases(empty)
    assert (finding.code, finding.case, finding.message) == ("E208", "", "all 2 labels are empty")
    assert examine_cases([*empty, full]) == []


def test_patient_on_both_sides_keeps_the_validation_cases_out(tmp_path: Path) -> None:
    facts = [replace(facts_of(make_case(tmp_path, name, i)), patient="p") for i, name in enumerate("abc")]
    findings = examine_cases(facts, {"b", "c"})
    assert {(finding.code, finding.case) for finding in findings} == {("E403", "b"), ("E403", "c")}
    assert examine_cases(facts) == examine_cases(facts, {"a", "b", "c"}) == []
    copies = [facts[0], replace(facts[0], name="d")]
    assert kept_out(examine_cases(copies, {"a"})) == {"d"}, "a copy that is kept out is not trained on"


@pytest.mark.parametrize(
    ("usable", "total", "minimum", "enough"),
    [(3, 5, 3, True), (2, 5, 3, False), (5, 5, None, True), (4, 5, None, False), (0, 0, None, False), (0, 0, 1, False)],
)
def test_site_needs_the_studys_number_of_cases(usable: int, total: int, minimum: int | None, enough: bool) -> None:
    findings = enough_cases(usable, total, minimum)
    assert [finding.code for finding in findings] == ([] if enough else ["E404"])
    assert all(finding.case == "" and finding.level == "error" for finding in findings)


# Codes


def test_codes_are_unique_and_say_their_level() -> None:
    codes = [code.code for code in Code]
    assert len(set(codes)) == len(codes)
    for code in Code:
        assert re.fullmatch(r"[EW]\d{3}", code.code)
        assert code.finding("x").level == ("error" if code.code[0] == "E" else "warning")
        assert code.advice.endswith(".") and not code.title.endswith(".")


def test_every_code_is_documented_and_no_other() -> None:
    documented = re.findall(r"^### `([EW]\d{3})` (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert documented == [(code.code, code.title) for code in sorted(Code, key=_place)]


def _place(code: Code) -> tuple[str, str]:
    return code.code[1], code.code


# Pictures


def decode(content: bytes) -> np.ndarray:
    return np.asarray(imagecodecs.png_decode(content))


def test_thumbnail_shows_the_slice_of_the_largest_label_with_its_outline(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", 1)
    picture = decode(thumbnail(case, size=120))
    assert picture.dtype == np.uint8 and picture.shape == (120, 100, 3)
    coloured = (picture.max(axis=-1) - picture.min(axis=-1)) > 30
    rows, columns = np.nonzero(coloured)
    # The label covers y 3 to 7 and x 3 to 8 of 12 x 10; seen from the feet with anterior up, both axes are reversed.
    assert (rows.min(), rows.max() + 1) == (10 * (12 - 8), 10 * (12 - 3))
    assert (columns.min(), columns.max() + 1) == (10 * (10 - 9), 10 * (10 - 3))
    assert not coloured[60:70, 40:50].any(), "an outline, not an area"


def test_thumbnail_of_a_plane_is_as_stored_and_in_colour(tmp_path: Path) -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:10, :20] = (250, 10, 10)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    picture = decode(thumbnail(Case("a", "a", {"": Source(tmp_path / "a.tif")}, None), 2, size=80))
    assert picture.shape == (40, 80, 3)
    assert picture[5, 5, 0] > 200 > 100 > picture[5, 5, 1] and picture[35, 70].max() < 50


def test_thumbnail_stretches_voxels_that_are_not_square(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32)
    source = nifti(tmp_path / "a.nii", array, np.diag([1.0, 2.0, 1.0, 1.0]))
    assert decode(thumbnail(Case("a", "a", {"": source}, None), size=100)).shape == (100, 50, 3)


@pytest.mark.parametrize("fault", ["label", "grid"])
def test_thumbnail_is_drawn_without_a_label_that_cannot_be_used(tmp_path: Path, fault: str) -> None:
    case = make_case(tmp_path, "a", 1)
    assert case.label is not None
    if fault == "label":
        case.label.path.write_bytes(b"")
    else:
        nifti(case.label.path, np.ones((3, 3, 3), np.uint8))
    picture = decode(thumbnail(case))
    assert (picture.max(axis=-1) == picture.min(axis=-1)).all()


def test_thumbnail_of_an_unreadable_image_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image gone\.nii: does not exist\. Put the file"):
        thumbnail(Case("a", "a", {"": Source(tmp_path / "gone.nii")}, None))


# Real data


@pytest.mark.parametrize(
    ("folder", "requirements"),
    [
        ("nuclei/brightfield_gray", Requirements(2, 3, ("background", "nucleus"), "instances")),
        ("hippocampus/high-range", Requirements(3, 1, ("background", "anterior", "posterior"), "classes")),
        (
            "brain_tumor_dicom",
            Requirements(3, 4, ("background", "tumour"), "classes", ("T1pre", "T1post", "T2", "FLAIR")),
        ),
    ],
)
def test_real_cases_are_all_usable(folder: str, requirements: Requirements) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs ../shared/data/{folder}")
    from common.imaging.discovery import discover

    discovery = discover(DATA / folder)
    examined = [examine_case(case, requirements) for case in discovery.cases]
    facts = [one for one, _ in examined if one is not None]
    assert len(facts) == len(discovery.cases) >= 3
    assert [finding for _, found in examined for finding in found] == []
    assert kept_out(examine_cases(facts)) == set()
    if folder == "brain_tumor_dicom":
        spacings = {image.spacing[0] for case in facts for image in case.images.values()}
        assert all(spacing == pytest.approx(6.5, abs=1e-3) for spacing in spacings)


@needs("brain_tumor_dicom")
def test_series_is_known_by_the_bytes_of_its_files(tmp_path: Path) -> None:
    from common.imaging.discovery import discover

    case = discover(DATA / "brain_tumor_dicom").cases[0]
    facts = facts_of(case)
    assert len(set(facts.digests.values())) == len(facts.digests) == 5
    assert facts_of(case) == facts


Writer = Callable[..., list[Path]]


def test_burnt_in_text_is_found_in_a_single_file_too(tmp_path: Path, write_series: Writer) -> None:
    def edit(dataset: object, z: int) -> None:
        dataset.BurnedInAnnotation = "YES"  # type: ignore[attr-defined]

    array = np.random.default_rng(0).integers(0, 500, (1, 16, 16)).astype(np.uint16)
    (path,) = write_series(tmp_path, array, np.eye(4), edit=edit)
    requirements = Requirements(2, 1, ("background", "mass"), "classes")
    _, findings = examine_case(Case("a", "a", {"": Source(path)}, None), requirements)
    assert [finding.code for finding in findings] == ["W120", "E201"]
