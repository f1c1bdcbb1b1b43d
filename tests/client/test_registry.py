"""A site's registry: what is known of its data, kept in one private file that several commands may use at once."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

import client.registry
from client.label_map import LabelMap, parse_label_map
from client.registry import Registry
from common.errors import DataError, RunFolderError, UsageError
from common.imaging.case import Case, Source
from common.imaging.layouts.options import Layout
from common.study import Study

CASES = 6


def write_case(folder: Path, name: str, seed: int, value: int = 1) -> None:
    rng = np.random.default_rng(seed)
    label = np.zeros((20, 24), np.uint8)
    label[4:12, 5:15] = value
    for kind, array in (("images", rng.integers(0, 200, label.shape, np.uint8)), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / kind / f"{name}.tif", array)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(CASES):
        write_case(tmp_path / "data", f"P{index // 2}_{index}", index)
    return tmp_path / "data"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "site.sqlite") as opened:
        yield opened


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that were read, in order."""
    names: list[str] = []
    real = client.registry.examine_case

    def examine(case: Case, *rest: object, **options: object) -> object:
        names.append(case.name)
        return real(case, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client.registry, "examine_case", examine)
    return names


def test_what_was_registered_is_there_for_the_next_command(tmp_path: Path, folder: Path) -> None:
    layout = Layout({"DWI": "b1000"}, "_gt$", "^(P[0-9])_")
    label_map = parse_label_map(["cell: 1 -> 1"])
    with Registry(tmp_path / "site.sqlite") as first:
        added = first.add("cells", folder, layout, label_map)
    found = Registry(tmp_path / "site.sqlite")
    assert found.data_sets() == [added] == [found.get("cells")]
    assert added.path == folder and added.arrangement == "pairs" and added.label_map == label_map
    assert [(case.name, case.patient) for case in found.cases("cells")] == [
        (f"P{n // 2}_{n}", f"P{n // 2}") for n in range(CASES)
    ]
    assert found.cases("cells")[0].images == {"": Source(folder / "images" / "P0_0.tif")}


def test_the_level_of_pyramids_is_kept_with_each_source(registry: Registry, folder: Path) -> None:
    registry.add("cells", folder, Layout(level=1))
    assert registry.get("cells").layout == Layout(level=1)
    assert {source.level for case in registry.cases("cells") for source in case.sources} == {1}
    registry.add("full", folder)
    assert {source.level for case in registry.cases("full") for source in case.sources} == {0}


def test_the_file_is_for_its_owner_alone_and_holds_no_pixels(tmp_path: Path, folder: Path) -> None:
    marked = np.frombuffer(b"pixels of a patient!" * 24, np.uint8).reshape(20, 24)
    tifffile.imwrite(folder / "images" / "P0_0.tif", marked)
    path = tmp_path / "site.sqlite"
    path.touch(0o666)
    registry = Registry(path)
    registry.add("cells", folder)
    registry.check(["cells"])
    for file in tmp_path.glob("site.sqlite*"):
        assert file.stat().st_mode & 0o777 == 0o600
        assert b"pixels of a patient" not in file.read_bytes()


def test_a_case_is_read_again_only_when_its_content_changed(
    registry: Registry, folder: Path, examined: list[str]
) -> None:
    registry.add("cells", folder)
    registry.check(["cells"])
    assert len(examined) == CASES
    examined.clear()
    before = registry.check(["cells"])
    os.utime(folder / "images" / "P0_0.tif", (1, 1))  # touched, but the same
    assert registry.check(["cells"]) == before and examined == []
    write_case(folder, "P1_2", seed=77)
    write_case(folder, "P9_9", seed=78)
    (folder / "images" / "P2_4.tif").unlink()
    (folder / "labels" / "P2_4.tif").unlink()
    after = registry.check(["cells"])
    assert examined == ["P1_2", "P9_9"]
    assert [case.name for case in after.usable] == ["P0_0", "P0_1", "P1_2", "P1_3", "P2_5", "P9_9"]


def test_what_was_examined_for_a_study_alone_outlives_a_touch_too(
    registry: Registry, folder: Path, examined: list[str], tiny_study: Callable[..., Study]
) -> None:
    registry.add("cells", folder)
    before = registry.check(["cells"], tiny_study())
    examined.clear()
    for path in folder.rglob("*.tif"):
        os.utime(path, (1, 1))
    assert registry.check(["cells"], tiny_study()) == before and examined == []
    write_case(folder, "P1_2", seed=77)
    registry.check(["cells"], tiny_study())
    assert examined == ["P1_2"]


def test_an_examination_for_a_study_lasts_until_an_image_changes_that_it_read(
    registry: Registry, tmp_path: Path, examined: list[str], tiny_study: Callable[..., Study]
) -> None:
    folder = tmp_path / "brain"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for kind in ("t1", "flair", "seg"):
        tifffile.imwrite(folder / f"a_{kind}.tif", rng.integers(0, 2, (20, 24), np.uint8))
    registry.add("brain", folder)
    (case,) = registry.cases("brain")
    one, other = sorted(case.images)
    study = tiny_study()
    study = dataclasses.replace(study, task=dataclasses.replace(study.task, modalities=(one.upper(),)))
    registry.check(["brain"])
    registry.check(["brain"], study)
    assert examined == ["a", "a"]
    examined.clear()
    for modality, expected in ((other, 1), (one, 2)):  # the examination for no study reads both
        tifffile.imwrite(case.images[modality].path, rng.integers(0, 200, (20, 24), np.uint8))
        registry.check(["brain"])
        registry.check(["brain"], study)
        assert len(examined) == expected
        examined.clear()


def test_a_file_with_the_old_size_and_time_is_noticed(registry: Registry, folder: Path, examined: list[str]) -> None:
    registry.add("cells", folder)
    registry.check(["cells"])
    examined.clear()
    path = folder / "images" / "P0_0.tif"
    before = path.stat()
    write_case(folder, "P0_0", seed=77)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    registry.check(["cells"])
    assert examined == ["P0_0"]


def test_a_file_that_could_not_be_read_for_a_while_is_tried_again(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("cells", folder)

    def refuse(source: Source, *rest: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source.path))

    with monkeypatch.context() as patch:
        patch.setattr("common.imaging.source_checks.read_image", refuse)
        check = registry.check(["cells"])
    assert check.usable == [] and {finding.code for finding in check.findings} == {"E105"}
    assert len(registry.check(["cells"]).usable) == CASES


@pytest.mark.parametrize("fault", ["damaged", "copied"])
def test_a_case_that_is_kept_out_costs_no_sound_case_of_its_patient(
    registry: Registry, tmp_path: Path, tiny_study: Callable[..., Study], fault: str
) -> None:
    folder = tmp_path / "siblings"
    for index in range(12):
        write_case(folder, f"P{index // 3}_{index}", index)
    for index in (0, 3, 6, 9):
        # Four patients, each with a case whose label has no such class, or whose image is that of a sound sibling.
        write_case(
            folder, f"P{index // 3}_{index}", index + 1 if fault == "copied" else index, 1 if fault == "copied" else 9
        )
    registry.add("cells", folder, Layout(patient_pattern="^(P[0-9]+)_"))
    _, check = registry.cases_for(with_minimum(tiny_study(), 1), ["cells"])
    assert len(check.usable) == 8
    assert {f.code for f in check.findings if f.level == "error"} == {"E401" if fault == "copied" else "E204"}


def test_an_examination_is_for_one_study_and_one_label_map(
    registry: Registry, folder: Path, examined: list[str], tiny_study: Callable[..., Study]
) -> None:
    write_case(folder, "odd", seed=50, value=4)
    registry.add("cells", folder)
    registry.add("mapped", folder, None, parse_label_map(["cell: 1 -> 1", "4 -> 1"]))
    study = with_minimum(tiny_study(), 1)
    assert len(registry.check(["cells"]).usable) == CASES + 1  # no study, no wrong class
    check = registry.check(["cells"], study)
    assert len(check.usable) == CASES and [f.code for f in check.findings if f.case == "odd"] == ["E204"]
    assert len(registry.check(["mapped"], study).usable) == CASES + 1
    examined.clear()
    registry.check(["cells"])
    registry.check(["cells"], study)
    assert examined == []


def with_minimum(study: Study, minimum: int | None) -> Study:
    return dataclasses.replace(study, cohort=dataclasses.replace(study.cohort, minimum_cases=minimum))


def test_a_study_gets_the_sound_cases_or_an_error_that_names_the_others(
    registry: Registry, folder: Path, tiny_study: Callable[..., Study]
) -> None:
    torn = folder / "images" / "P1_2.tif"
    torn.write_bytes(torn.read_bytes()[:-40])
    registry.add("cells", folder, None, parse_label_map(["cell: 1 -> 1"]))
    label_map, check = registry.cases_for(with_minimum(tiny_study(), CASES - 1), ["cells"])
    assert label_map == {1: 1}
    assert len(check.usable) == CASES - 1 and len(check.names) == CASES
    assert all(set(case.images) == {""} for case in check.usable)
    for minimum in (CASES, None):  # None asks for all of them
        with pytest.raises(DataError, match=r"E101 image P1_2\.tif"):
            registry.cases_for(with_minimum(tiny_study(), minimum), ["cells"])


def test_an_error_of_the_folder_itself_refuses_the_study(
    registry: Registry, folder: Path, tiny_study: Callable[..., Study]
) -> None:
    registry.add("cells", folder)
    (folder / "patients.csv").write_bytes(b"\xff")  # whose cases these are is not known any more
    with pytest.raises(DataError, match=r"patients\.csv: cannot be read"):
        registry.cases_for(with_minimum(tiny_study(), 1), ["cells"])


def test_several_data_sets_are_one_with_names_that_tell_them_apart(
    registry: Registry, folder: Path, tmp_path: Path, tiny_study: Callable[..., Study]
) -> None:
    write_case(tmp_path / "other", "P0_0", seed=90)
    write_case(tmp_path / "other", "new", seed=91)
    registry.add("cells", folder)
    registry.add("other", tmp_path / "other")
    _, check = registry.cases_for(tiny_study(), ["cells", "other"])
    names = [case.name for case in check.usable]
    assert len(names) == CASES + 2 and {"cells/P0_0", "other/P0_0", "P0_1", "new"} <= set(names)
    registry.add("mapped", tmp_path / "other", None, parse_label_map(["1 -> 1"]))
    with pytest.raises(DataError, match="label map"):
        registry.cases_for(tiny_study(), ["cells", "mapped"])


def test_the_same_image_in_two_data_sets_is_a_duplicate(
    registry: Registry, folder: Path, tmp_path: Path, tiny_study: Callable[..., Study]
) -> None:
    write_case(tmp_path / "other", "copy", seed=0)
    registry.add("cells", folder)
    registry.add("other", tmp_path / "other")
    check = registry.check(["cells", "other"], tiny_study())
    assert [(f.code, f.case) for f in check.findings if f.level == "error"] == [("E401", "copy")]


def test_names_of_classes_must_be_those_of_the_study(
    registry: Registry, folder: Path, tiny_study: Callable[..., Study]
) -> None:
    registry.add("cells", folder, None, parse_label_map(["tumour: 1 -> 1"]))
    with pytest.raises(DataError, match="calls class 1 'tumour', but class 1 is 'cell'"):
        registry.cases_for(tiny_study(), ["cells"])


def test_removing_forgets_and_leaves_the_files(registry: Registry, folder: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    registry.add("cells", folder)
    registry.check(["cells"])
    registry.remove("cells")
    assert registry.data_sets() == [] and sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before
    for action in (
        registry.get,
        registry.cases,
        registry.remove,
        registry.refresh,
        lambda name: registry.check([name]),
    ):
        with pytest.raises(UsageError, match="not registered"):
            action("cells")
    registry.add("cells", folder)  # nothing of the old one is left to contradict


def test_names_that_are_taken_or_none_are_refused(registry: Registry, folder: Path) -> None:
    registry.add("cells", folder)
    with pytest.raises(UsageError, match="registered already"):
        registry.add("cells", folder)
    for name in ("", "a/b", "-x", "a" * 64):
        with pytest.raises(UsageError, match="expected a name"):
            registry.add(name, folder)
    with pytest.raises(DataError, match="does not exist"):
        registry.add("none", folder / "nowhere")


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "site.sqlite"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="move it away and add the data sets again"):
        Registry(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "site.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE patients (name TEXT)")
    database.close()
    with pytest.raises(RunFolderError, match="another program's"):
        Registry(path)
    assert sqlite3.connect(path).execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)


def test_rights_are_changed_of_a_registry_alone(tmp_path: Path) -> None:
    ours, other, text = tmp_path / "ours.sqlite", tmp_path / "other.sqlite", tmp_path / "notes.txt"
    Registry(ours).close()
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE patients (name TEXT)")
    database.close()
    text.write_text("no database")
    for path in (ours, other, text):
        path.chmod(0o644)
    content = other.read_bytes()
    for path in (other, text):
        with pytest.raises(RunFolderError):
            Registry(path)
        assert path.stat().st_mode & 0o777 == 0o644
    assert other.read_bytes() == content, "not even how it keeps its journal"
    Registry(ours).close()
    assert ours.stat().st_mode & 0o777 == 0o600


def test_a_registry_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.sqlite"
    Registry(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(RunFolderError, match="version 99"):
        Registry(path)


def test_a_row_that_was_altered_is_damage_not_a_defect(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "site.sqlite"
    registry = Registry(path)
    registry.add("cells", folder)
    registry.check(["cells"])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE examinations SET facts = '{}'")
    database.close()
    with pytest.raises(RunFolderError, match="damaged"):
        registry.check(["cells"])


def test_a_registry_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "site.sqlite"):
        with pytest.raises(RunFolderError, match="choose another --registry"):
            Registry(path)


_ADDER = """
import sys
from pathlib import Path
from client.registry import Registry
for n in range(6):
    registry = Registry(Path(sys.argv[1]))
    registry.add(f"{sys.argv[3]}-{n}", Path(sys.argv[2]))
    registry.check([f"{sys.argv[3]}-{n}"])
    if n % 2:
        registry.remove(f"{sys.argv[3]}-{n}")
    registry.close()
"""


def test_commands_that_run_at_once_do_not_disturb_each_other(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "site.sqlite"
    commands = [
        subprocess.Popen([sys.executable, "-c", _ADDER, str(path), str(folder), name], stderr=subprocess.PIPE)
        for name in ("a", "b", "c")
    ]
    for command in commands:
        _, errors = command.communicate(timeout=120)
        assert command.returncode == 0, errors.decode()
    registry = Registry(path)
    assert [one.name for one in registry.data_sets()] == [f"{name}-{n}" for name in "abc" for n in (0, 2, 4)]
    assert all(len(registry.check([one.name]).usable) == CASES for one in registry.data_sets())


def test_a_data_set_that_goes_while_it_is_examined_leaves_nothing_behind(
    tmp_path: Path, registry: Registry, folder: Path
) -> None:
    registry.add("cells", folder)
    other = Registry(tmp_path / "site.sqlite")

    def forget(done: int, total: int) -> None:
        if done == 2:
            other.remove("cells")

    registry.check(["cells"], on_case=forget)
    assert registry.data_sets() == []
    with sqlite3.connect(tmp_path / "site.sqlite") as database:
        assert database.execute("SELECT count(*) FROM examinations").fetchone() == (0,)


def test_images_are_found_under_a_studys_names_for_them() -> None:
    def given(*modalities: str) -> Case:
        return Case("a", "a", {modality: Source(Path(modality or "image")) for modality in modalities}, None)

    def taken(case: Case, *wanted: str) -> dict[str, str]:
        return {modality: source.name for modality, source in case.with_modalities(wanted).images.items()}

    assert taken(given("t1POST", "FLAIR", "ADC"), "T1post", "T2", "flair") == {"T1post": "t1POST", "flair": "FLAIR"}
    assert taken(given(""), "CT") == {"CT": "image"}
    assert taken(given("CT")) == {"": "CT"}
    assert taken(given("CT", "")) == {"": "image"}
    assert taken(given("CT", "MR")) == {}
    assert taken(given(""), "CT", "MR") == {}


@pytest.mark.parametrize(
    ("texts", "classes", "names"),
    [
        (["4 -> 1"], {4: 1}, {}),
        (["tumour: 4 -> 1"], {4: 1}, {1: "tumour"}),
        (["tumour core:1->1", "tumour core: 4->1"], {1: 1, 4: 1}, {1: "tumour core"}),
        (["1 -> 2, edema: 2 -> 1"], {1: 2, 2: 1}, {1: "edema"}),
    ],
)
def test_label_maps_are_read(texts: list[str], classes: dict[int, int], names: dict[int, str]) -> None:
    found = parse_label_map(texts)
    assert found == LabelMap(classes, names)
    assert LabelMap.from_json(found.to_json()) == found and parse_label_map([str(found)]) == found


@pytest.mark.parametrize(
    "texts",
    [
        [""],
        ["4"],
        ["4 > 1"],
        ["tumour -> 1"],
        ["4 -> tumour"],
        ["4 -> 1 -> 2"],
        ["4.5 -> 1"],
        ["-1 -> 1"],
        ["4 -> -1"],
        ["4 -> 256"],
        [f"{2**31} -> 1"],
        ["4 -> 1", "4 -> 2"],
        ["a: 4 -> 1", "b: 5 -> 1"],
        ["a: 4 -> 1", "a: 5 -> 2"],
        [": 4 -> 1"],
    ],
)
def test_nonsense_in_a_label_map_is_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="label map"):
        parse_label_map(texts)


def test_facts_of_an_older_version_are_taken_anew(
    registry: Registry, tmp_path: Path, folder: Path, examined: list[str]
) -> None:
    registry.add("cells", folder)
    registry.check(["cells"])
    with sqlite3.connect(tmp_path / "site.sqlite") as database:
        rows = database.execute("SELECT rowid, facts FROM examinations").fetchall()
        for row, text in rows:
            facts = json.loads(text)
            for one in (*facts["images"].values(), facts["label"]):
                del one["stated"]  # which older versions did not know
            mark = f"of before {row}"
            database.execute(
                "UPDATE examinations SET facts = ?, asked = ? WHERE rowid = ?", (json.dumps(facts), mark, row)
            )
    examined.clear()
    (folder / "images" / sorted(path.name for path in (folder / "images").iterdir())[0]).touch()
    check = registry.check(["cells"])
    assert len(examined) == CASES and len(check.usable) == CASES
    assert all(image.stated for one in check.examined if one.facts for image in one.facts.images.values())
