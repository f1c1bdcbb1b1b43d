"""Finding cases in what hospitals' systems export: pairs, neighbours, tables, channels and DICOM sessions."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import generate_uid

from common.errors import DataError, UsageError
from common.imaging.discovery import Discovery, discover
from common.imaging.layouts.options import Layout
from tests.common.imaging.test_readers_dicom_labels import write_segmentation

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def make(folder: Path, *names: str) -> Path:
    """Files that nobody opens."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def told(found: Discovery) -> dict[str, tuple[dict[str, str], str | None]]:
    """Case -> (modality -> file, label), by the last parts of the paths."""
    return {
        case.name: ({modality: source.name for modality, source in case.images.items()}, case.label and case.label.name)
        for case in found.cases
    }


def codes(found: Discovery) -> list[tuple[str, str]]:
    return [(finding.code, finding.case) for finding in found.findings]


def test_images_and_labels_are_paired_by_name(tmp_path: Path) -> None:
    make(tmp_path, "images/b.tif", "images/a.nii.gz", "images/.DS_Store", "images/c.1.TIFF")
    make(tmp_path, "labels/c.1.tif", "labels/a.nii", "labels/b.tif", "labels/.hidden.tif", "labels/README.md")
    found = discover(tmp_path)
    assert found.arrangement == "pairs"
    assert told(found) == {
        "a": ({"": "a.nii.gz"}, "a.nii"),
        "b": ({"": "b.tif"}, "b.tif"),
        "c.1": ({"": "c.1.TIFF"}, "c.1.tif"),
    }
    assert found.findings == []
    assert [case.patient for case in found.cases] == ["a", "b", "c.1"]


def test_what_has_no_partner_or_two_is_found_and_costs_only_itself(tmp_path: Path) -> None:
    make(tmp_path, "images/a.tif", "images/b.tif", "images/b.tiff", "images/scan.jpg", "images/d.tif")
    make(tmp_path, "labels/b.tif", "labels/c.tif", "labels/d.tif")
    found = discover(tmp_path)
    assert told(found)["a"] == ({"": "a.tif"}, None)  # examined later, as a case without a label
    assert sorted(codes(found)) == [("E503", "b"), ("W520", "c"), ("W521", "")]
    assert told(found)["d"] == ({"": "d.tif"}, "d.tif")


def test_folders_of_images_that_the_arrangement_has_no_place_for_are_told(tmp_path: Path) -> None:
    make(tmp_path / "pairs", "images/a.tif", "labels/a.tif", "second/deep/b.tif", "second/deep/c.tif", "notes/read.txt")
    make(tmp_path / "beside", "one/a.tif", "one/a_label.tif", "two/README")
    (tmp_path / "beside" / "three").mkdir()
    (tmp_path / "beside" / "three" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    for name, message in (
        ("pairs", "folder second/deep: 2 images left out"),
        ("beside", "folder three: 1 image left out"),
    ):
        found = discover(tmp_path / name)
        assert list(told(found)) == ["a"]
        assert [(finding.code, finding.message) for finding in found.findings] == [("W523", message)]


def test_a_name_composed_in_another_way_is_the_same_name(tmp_path: Path) -> None:
    make(tmp_path, "images/caf\u00e9.tif", "labels/cafe\u0301.tif")
    assert told(discover(tmp_path)) == {"caf\u00e9": ({"": "caf\u00e9.tif"}, "cafe\u0301.tif")}


def test_a_name_that_is_no_text_is_found_and_the_others_are_taken(tmp_path: Path) -> None:
    make(tmp_path, "images/a.tif", "labels/a.tif")
    Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/\xff.tif")).write_bytes(b"x")
    found = discover(tmp_path)
    assert list(told(found)) == ["a"]
    assert codes(found) == [("E107", "\\xff.tif")]


def test_a_link_that_leads_to_itself_stops_nothing(tmp_path: Path) -> None:
    make(tmp_path, "one/a.tif", "one/a_seg.tif")
    (tmp_path / "one" / "back").symlink_to(tmp_path)
    (tmp_path / "one" / "loop.tif").symlink_to(tmp_path / "one" / "loop.tif")
    found = discover(tmp_path)
    assert told(found) == {"a": ({"": "a.tif"}, "a_seg.tif"), "loop": ({"": "loop.tif"}, None)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_closed_folder_counts_as_a_case_that_is_kept_out(tmp_path: Path) -> None:
    make(tmp_path, "a.tif", "a_seg.tif", "closed/b.tif")
    (tmp_path / "closed").chmod(0)
    try:
        found = discover(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert list(told(found)) == ["a"] and codes(found) == [("E501", "closed")]


def test_only_a_folder_that_cannot_be_listed_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        discover(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be listed"):
        discover(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert codes(discover(tmp_path / "empty")) == [("E502", "")]


def test_a_folder_of_sites_says_to_add_each(tmp_path: Path) -> None:
    make(tmp_path, "north/images/a.tif", "north/labels/a.tif", "south/images/a.tif", "south/labels/a.tif")
    found = discover(tmp_path)
    assert found.cases == [] and "north, south" in found.findings[0].advice


def test_channels_of_nnunet_are_a_case_with_the_names_of_its_dataset_json(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/la_003_0000.nii.gz", "imagesTr/la_003_0001.nii.gz", "labelsTr/la_003.nii.gz")
    images = {"0000": "la_003_0000.nii.gz", "0001": "la_003_0001.nii.gz"}
    assert told(discover(tmp_path)) == {"la_003": (images, "la_003.nii.gz")}
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1w", "1": "ADC"}}')
    assert list(discover(tmp_path).cases[0].images) == ["T1pre", "ADC"]
    assert list(discover(tmp_path, Layout({"DWI": "adc"})).cases[0].images) == ["T1pre", "DWI"]


def test_a_single_channel_is_the_image(tmp_path: Path) -> None:
    make(tmp_path, "imagesTr/p_0000.nii.gz", "imagesTr/q_0000.nii.gz", "labelsTr/p.nii.gz", "labelsTr/q.nii.gz")
    assert told(discover(tmp_path)) == {name: ({"": f"{name}_0000.nii.gz"}, f"{name}.nii.gz") for name in ("p", "q")}


def test_a_number_at_the_end_of_a_name_is_no_channel(tmp_path: Path) -> None:
    make(tmp_path, "images/scan_2019.tif", "images/scan_2020.tif", "labels/scan_2019.tif", "labels/scan_2020.tif")
    assert list(told(discover(tmp_path))) == ["scan_2019", "scan_2020"]
    make(tmp_path, "images/scan.tif", "labels/scan.tif", "images/scan_2.tif")
    # No modality is called 2: an image without a label, not a part of the case.
    assert told(discover(tmp_path))["scan_2"] == ({"": "scan_2.tif"}, None)


def test_labels_beside_images_and_modalities_by_name(tmp_path: Path) -> None:
    for patient in ("B_001", "B_002"):
        make(tmp_path, *(f"{patient}/{patient}_{part}.nii.gz" for part in ("t1", "t1ce", "t2", "flair", "seg")))
    found = discover(tmp_path)
    assert found.arrangement == "side by side"
    images = {"FLAIR": "B_001_flair.nii.gz", "T1pre": "B_001_t1.nii.gz", "T1post": "B_001_t1ce.nii.gz"}
    assert told(found)["B_001"] == ({**images, "T2": "B_001_t2.nii.gz"}, "B_001_seg.nii.gz")
    assert len(found.cases) == 2 and found.findings == []


def test_cases_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, *(f"{patient}/{name}.tif" for patient in ("ann", "bob") for name in ("scan", "scan_mask")))
    found = discover(tmp_path, Layout(patient_pattern="^([a-z]+)/"))
    assert [(case.name, case.patient) for case in found.cases] == [("ann/scan", "ann"), ("bob/scan", "bob")]


def test_patients_come_from_the_pattern_or_from_the_table(tmp_path: Path) -> None:
    make(tmp_path, *(f"{kind}/P{n}_{eye}.tif" for kind in ("images", "labels") for n in (1, 2) for eye in "LR"))
    found = discover(tmp_path, Layout(patient_pattern="^(P[0-9]+)_"))
    assert [case.patient for case in found.cases] == ["P1", "P1", "P2", "P2"]
    (tmp_path / "patients.csv").write_text("case;patient\nP1_L;x\nP1_R;x\nP2_L;y\nP2_L;z\n", "utf-8-sig")
    found = discover(tmp_path)
    assert [case.patient for case in found.cases] == ["x", "x", "y", "P2_R"]
    assert codes(found) == [("E101", "P2_L"), ("W521", "")]  # two patients for one case, none for another


def test_a_table_says_everything(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(
        "case,patient,T1post,FLAIR,label\n"
        "one,ann,a/t1.nii.gz,a/fl.nii.gz,a/mask.nii.gz\n"
        "two,ann,b/series,,b/mask.nii.gz\n"
        "\n"
        "three,bob,c.nii.gz\n"
        "one,bob,c.nii.gz,,\n"
        "four,bob,,,d.nii.gz\n"
        ",bob,c.nii.gz,,\n"
    )
    found = discover(tmp_path)
    assert found.arrangement == "table"
    assert [(case.name, case.patient, sorted(case.images)) for case in found.cases] == [
        ("one", "ann", ["FLAIR", "T1post"]),
        ("two", "ann", ["T1post"]),
    ]
    assert found.cases[1].images["T1post"].path == tmp_path / "b" / "series"
    assert codes(found) == [
        ("E504", "cases.csv row 5"),
        ("E503", "one"),
        ("E504", "four"),
        ("E504", "cases.csv row 8"),
    ]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"patient,image\nx,y\n", b"case,a,a\nx,y,z\n", b'case,"image\n']
)
def test_a_table_that_cannot_be_understood_is_one_finding(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cases.csv").write_bytes(content)
    assert codes(discover(tmp_path)) == [("E504", ""), ("E502", "")]


@pytest.mark.parametrize(
    ("description", "modality"),
    [
        ("T1post", "T1post"),
        ("T1pre_reg", "T1pre"),
        ("Ax T1 +C", "T1post"),
        ("B T1 AXIAL SE +", "T1post"),
        ("t1ce", "T1post"),
        ("t1c", "T1post"),
        ("MPRAGE T1 Gd", "T1post"),
        ("t1 without contrast", "T1pre"),
        ("T1w", "T1pre"),
        ("sag t1_tse", "T1pre"),
        ("B T2 FLAIR AXIAL", "FLAIR"),
        ("T2_reg", "T2"),
        ("Ax T2", "T2"),
        *[(text, "T1pre") for text in ("T1 w/o contrast", "T1 w/o GD", "T1 no gad", "T1 sans gado", "T1 -C", "T1W_C-")],
        *[(text, "T1pre") for text in ("T1 ohne KM", "T1 vor KM", "non-contrast T1", "T1 non contrast", "t1_native")],
        *[(text, "T1pre") for text in ("T1 unenhanced", "pre_gd T1", "T1 C-SPINE", "T1 posterior fossa", "T1 w/o FS")],
        *[
            (text, "T1post")
            for text in ("T1 mit KM", "t1_vibe_dixon_ce", "T1 post", "T1 +C", "T1ce", "T1 gad", "T1wGd")
        ],
        *[(text, "T1post") for text in ("T1 post w/o fat sat", "T1_CE", "post T1", "KM T1", "T1 enhanced", "T1W +C")],
        *[
            (text, None)
            for text in ("Ax T1 FLAIR", "T1 w/wo contrast", "T1 with and without GD", "T1-C", "T1 pre/post")
        ],
        *[(text, None) for text in ("T2STAR", "T2*", "T2 *", "t2_star", "T2 MAP", "DWI T2", "T1 map", "ADC T2")],
        *[(text, "T2") for text in ("T2W", "t2_tse", "T2 without contrast")],
        ("T2 FLAIR +C", "FLAIR"),
        ("T2* GRE", None),
        ("T12 spine", None),
        ("localizer", None),
        ("CT Abdomen", "CT"),
        ("doctor", None),
    ],
)
def test_descriptions_name_the_modality(description: str, modality: str | None) -> None:
    assert Layout().modality_of(description) == modality


def test_the_sites_own_rules_go_before_the_built_in_ones() -> None:
    layout = Layout({"T2": "dark", "DWI": "b1000"})
    assert layout.modality_of("FLAIR b1000") == "DWI"
    assert layout.modality_of("Ax T2") is None  # its own rule is in place of the built-in one
    assert layout.modality_of("T1post") == "T1post"


@pytest.mark.parametrize(
    "options",
    [
        {"channel_map": {"T1": "("}},
        {"channel_map": {"T1": ""}},
        {"channel_map": {"a b": "x"}},
        {"label": "["},
        {"patient_pattern": "P[0-9]+"},
        {"level": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        Layout(**options)


def unsearchable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As if `folder` had the right r without x: what is in it has names and nothing else."""
    real = os.stat

    def stat(path, *rest, **options):
        if not isinstance(path, int) and Path(os.fsdecode(path)).parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)


def test_a_folder_that_may_be_listed_but_not_searched_is_told_at_any_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make(tmp_path / "pairs", "images/a.tif", "labels/a.tif")
    nested = make(tmp_path / "nested", "a.tif", "a_seg.tif", "below/b.tif")
    dicom = make(tmp_path / "dicom", "below/b")
    for root, closed, expected in (
        (pairs, pairs, {("E501", "images"), ("E501", "labels"), ("E502", "")}),
        (pairs, pairs / "images", {("E501", "a.tif"), ("W520", "a"), ("E502", "")}),
        (nested, nested / "below", {("E501", "b.tif")}),
        (dicom, dicom / "below", {("E501", "b"), ("E502", "")}),
    ):
        with monkeypatch.context() as patch:
            unsearchable(patch, closed)
            found = discover(root)
        assert set(codes(found)) == expected


def test_rows_of_patients_and_cases_must_match(tmp_path: Path) -> None:
    make(tmp_path, "images/a.tif", "images/b.tif", "images/caf\u00e9.tif", "labels/a.tif", "labels/lonely.tif")
    (tmp_path / "patients.csv").write_text("case,patient\na,P1\nA2,P1\nlonely,P2\ncafe\u0301,P1\n", "utf-8")
    found = discover(tmp_path)
    assert [(case.name, case.patient) for case in found.cases] == [("a", "P1"), ("b", "b"), ("caf\u00e9", "P1")]
    error, warning = [finding for finding in found.findings if finding.file == "patients.csv"]
    assert (error.level, error.case) == ("error", "") and error.message.endswith("no case is called A2")
    assert (warning.level, warning.case) == ("warning", "") and warning.message.endswith("has no row for b")


def test_columns_that_differ_in_capitals_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("case,T1,t1\nx,a.tif,b.tif\n")
    assert codes(discover(tmp_path)) == [("E504", ""), ("E502", "")]


AFFINE = np.diag([0.8, 0.8, 2.5, 1.0])
VOXELS = np.arange(3 * 4 * 4, dtype=np.int16).reshape(3, 4, 4)


@pytest.fixture
def write(write_series: Callable[..., list[Path]]) -> Callable[..., None]:
    """Writes a series: `write(folder, "T2", patient="ann", study="s", modality="MR")`."""

    def series(folder: Path, description: str, patient: str = "ann", study: str = "s", modality: str = "MR") -> None:
        def edit(dataset, z) -> None:
            dataset.SeriesDescription, dataset.PatientID, dataset.Modality = description, patient, modality
            dataset.StudyInstanceUID = generate_uid(entropy_srcs=[study])
            dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[study, description, str(folder)])
            dataset.StudyDate = "20010203"

        folder.mkdir(parents=True, exist_ok=True)
        write_series(folder, VOXELS, AFFINE, edit=edit)

    return series


def test_a_session_is_a_case_of_its_patient(tmp_path: Path, write: Callable[..., None]) -> None:
    for patient, study in (("ann", "s1"), ("ann", "s2"), ("bob", "s3")):
        for description in ("T1post", "T2", "Mask_Tumor"):
            write(tmp_path / patient / study / description, description, patient, study)
    found = discover(tmp_path)
    assert found.arrangement == "dicom" and found.findings == []
    assert [case.patient for case in found.cases] == ["ann", "ann", "bob"]
    assert len({case.name for case in found.cases}) == 3
    assert found.cases[2].name == "bob_20010203"
    assert told(found)["bob_20010203"] == ({"T1post": "T1post", "T2": "T2"}, "Mask_Tumor")
    assert all(source.series for case in found.cases for source in case.sources)


def test_series_of_one_folder_are_told_apart_by_their_headers(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "all", "T2")
    write(tmp_path / "all2", "FLAIR")
    write(tmp_path / "all3", "tumour mask")
    for n, path in enumerate([path for path in sorted(tmp_path.rglob("*")) if path.is_file()]):
        path.rename(tmp_path / f"IM{n}")
    case = discover(tmp_path).cases[0]
    assert sorted(case.images) == ["FLAIR", "T2"] and case.label is not None
    assert {source.path for source in case.sources} == {tmp_path}
    assert len({source.series for source in case.sources}) == 3


def test_two_series_for_one_modality_keep_the_case_out_until_it_is_said_which(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    for description in ("T2 axial", "T2 coronal", "localizer", "mask"):
        write(tmp_path / description.replace(" ", "-"), description)
    found = discover(tmp_path)
    assert ("E503", "ann_20010203") in codes(found)
    assert any("localizer" in finding.message and finding.level == "warning" for finding in found.findings)
    found = discover(tmp_path, Layout({"T2": "t2 axial"}))
    assert told(found) == {"ann_20010203": ({"T2": "T2-axial"}, "mask")}


def test_of_ct_the_channel_map_tells_the_image_from_the_scout(tmp_path: Path, write: Callable[..., None]) -> None:
    for description in ("Abdomen 5mm", "Scout"):
        write(tmp_path / description.replace(" ", "-"), description, modality="CT")
    assert codes(discover(tmp_path)) == [("E503", "ann_20010203")]
    found = discover(tmp_path, Layout({"CT": "abdomen"}))
    assert told(found) == {"ann_20010203": ({"CT": "Abdomen-5mm"}, None)}
    assert codes(found) == [("W521", "ann_20010203")]


def test_what_descriptions_were_taken_for_is_kept(tmp_path: Path, write: Callable[..., None]) -> None:
    for patient in ("ann", "bob"):
        for description in ("T1 mit KM", "Ax T1 FLAIR"):
            write(tmp_path / patient / description.replace(" ", "-"), description, patient, patient)
    assert discover(tmp_path).taken_for == {("Ax T1 FLAIR", ""): 2, ("T1 mit KM", "T1post"): 2}


def test_what_names_of_files_were_taken_for_is_kept(tmp_path: Path) -> None:
    make(tmp_path, "a_t1ce.nii", "a_flair.nii", "a_seg.nii", "b_t1ce.nii", "b_seg.nii")
    assert discover(tmp_path).taken_for == {
        ("flair", "FLAIR"): 1,
        ("seg", "label"): 2,
        ("t1ce", "T1post"): 2,
    }


def test_a_label_pattern_chooses_between_labels(tmp_path: Path, write: Callable[..., None]) -> None:
    for description in ("T2", "mask first reader", "mask second reader"):
        write(tmp_path / description.replace(" ", "-"), description)
    assert ("E209", "ann_20010203") in codes(discover(tmp_path))
    found = discover(tmp_path, Layout(label="mask second"))
    assert told(found)["ann_20010203"][1] == "mask-second-reader"


def test_series_that_the_label_was_not_drawn_on_is_told_as_left_out(tmp_path: Path, write: Callable[..., None]) -> None:
    for description in ("T2 axial", "T2 coronal"):
        write(tmp_path / description.replace(" ", "-"), description)
    masks = (VOXELS % 2).astype(np.uint8)[..., np.newaxis]
    write_segmentation(tmp_path / "seg.dcm", sorted((tmp_path / "T2-coronal").iterdir()), masks, "BINARY")
    found = discover(tmp_path)
    assert told(found) == {"ann_20010203": ({"T2": "T2-coronal"}, "seg.dcm")}
    (finding,) = found.findings
    assert (finding.code, finding.case) == ("W522", "ann_20010203")
    assert finding.message == "the label was drawn on T2 coronal; left out: T2 axial"


def test_series_that_are_described_alike_are_told_by_their_files(tmp_path: Path, write: Callable[..., None]) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder, "T2")
    masks = (VOXELS % 2).astype(np.uint8)[..., np.newaxis]
    files = sorted((tmp_path / "two").iterdir())
    write_segmentation(tmp_path / "seg.dcm", files, masks, "BINARY")
    (finding,) = discover(tmp_path).findings
    assert finding.code == "W522"
    first = sorted((tmp_path / "one").iterdir())[0].name
    assert finding.message == f"the label was drawn on T2 (two/{files[0].name}); left out: T2 (one/{first})"


def test_a_name_of_the_users_replaces_the_built_in_one_whatever_its_capitals() -> None:
    layout = Layout({"flair": "dark", "ct": "abdomen"})
    assert layout.modality_of("T2 dark fluid") == "flair"
    assert layout.modality_of("FLAIR") is None, "the built-in rule has gone with the name"
    assert layout.names("FLAIR") and layout.names("CT") and not layout.names("T2")


def test_modalities_that_differ_in_capitals_alone_keep_the_case_out(tmp_path: Path) -> None:
    make(tmp_path, "a_t2.nii", "a_flair.nii", "a_seg.nii", "b_flair.nii", "b_seg.nii")
    found = discover(tmp_path, Layout({"flair": "^t2", "FLAIR": "flair"}))
    assert codes(found) == [("E503", "a")]
    assert found.findings[0].message == "case a: FLAIR, flair are one modality, as capitals do not count"


def test_which_series_are_labels_is_kept_and_which_pattern_finds_none(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    for description in ("T2", "Mask_Tumor"):
        write(tmp_path / "P1" / description, description)
    assert discover(tmp_path).taken_for == {("Mask_Tumor", "label"): 1, ("T2", "T2"): 1}
    found = discover(tmp_path, Layout(label="nothere", patient_pattern="^X([0-9])"))
    assert found.taken_for == {("Mask_Tumor", ""): 1, ("T2", "T2"): 1}
    (told,) = [finding for finding in found.findings if finding.code == "W524"]
    assert told.message == "--label 'nothere' matches none of the names: Mask_Tumor, T2"
    assert [case.patient for case in found.cases] == ["ann"] and len(found.without_patient) == 1
    assert found.without_patient[0].startswith("P1/"), "the folder in which it was looked for"
    assert discover(tmp_path, Layout(patient_pattern="^P([0-9])")).without_patient == []


def test_sources_are_read_at_the_level_that_is_wanted(tmp_path: Path, write: Callable[..., None]) -> None:
    make(tmp_path / "pairs", "images/a.tif", "labels/a.tif")
    make(tmp_path / "beside", "a.tif", "a_seg.tif")
    make(tmp_path / "table", "a.tif", "b.tif")
    (tmp_path / "table" / "cases.csv").write_text("case,image,label\na,a.tif,b.tif\n")
    for description in ("T2", "mask"):
        write(tmp_path / "dicom" / description, description)
    for folder in ("pairs", "beside", "table", "dicom"):
        sources = [source for case in discover(tmp_path / folder, Layout(level=2)).cases for source in case.sources]
        assert [source.level for source in sources] == [2, 2], folder
        assert {source.level for case in discover(tmp_path / folder).cases for source in case.sources} == {0}


def test_damaged_dicom_alone_in_its_folder_is_a_case_kept_out(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "good", "T2")
    make(tmp_path, "torn/a.dcm", "notes.xyz")
    (tmp_path / "torn" / "zero.dcm").write_bytes(b"")
    found = discover(tmp_path)
    assert len(found.cases) == 1
    assert sorted(codes(found)) == [("E101", "torn/a.dcm"), ("E101", "torn/zero.dcm"), ("W521", "")]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real images are not at {DATA}")
def test_real_folders_are_understood() -> None:
    brain = discover(DATA / "brain_tumor_dicom")
    assert [(case.patient, sorted(case.images)) for case in brain.cases] == [
        (patient, ["FLAIR", "T1post", "T1pre", "T2"]) for patient in ("PGBM-001", "PGBM-001", "PGBM-003")
    ]
    assert all(case.label and "MaskTumor" in case.label.name for case in brain.cases)
    assert brain.findings == []
    microscopy = discover(DATA / "microscopy_3d")
    assert [case.name for case in microscopy.cases] == ["nuclei_3d", "rgb_3D_0", "rgb_3D_1"]
    assert all(case.label and "_segm" in case.label.name for case in microscopy.cases)
    assert len(discover(DATA / "nuclei" / "fluo_small").cases) == 259


@pytest.mark.skipif(not DATA.is_dir(), reason=f"real images are not at {DATA}")
def test_dicom_seg_goes_to_the_series_it_was_drawn_on() -> None:
    (case,) = discover(DATA / "dicom_seg" / "segmentations" / "23x38x3").cases
    assert case.label is not None and case.label.name == "label.seg"
    assert case.images["CT"].name == "image"  # not the multi-frame copy of the same session
    everything = discover(DATA / "dicom_seg" / "segmentations")
    assert len(everything.cases) == 3
    assert sum(code == "E209" for code, _ in codes(everything)) == 2  # two sessions have several labels
