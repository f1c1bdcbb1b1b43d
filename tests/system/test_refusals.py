"""What cannot work ends in one clear error and its documented exit code, at once where nothing needs to be compiled."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


def assert_refused(code: int, text: str, expected: int, *words: str) -> None:
    assert code == expected, text
    assert "Traceback" not in text
    assert [line[:6] for line in text.splitlines() if "error:" in line] == ["error:"], text
    for word in words:
        assert word in text


# At once: the commands run where TensorFlow cannot be loaded. -------------------------------------------------------


@pytest.fixture(scope="module")
def study(setting: Callable[[str], Any], short_study: str) -> Any:
    made = setting(short_study)
    made.identities("east", "north")
    made.address = "127.0.0.1:1"  # nobody is there
    return made


@pytest.fixture
def coordinator(study: Any, wardround: Callable[..., Any], without_tensorflow: Path) -> Callable[..., Any]:
    """Calls `wardround coordinator` with these options in place of its usual ones."""

    def run(file: Path | None = None, **options: str | Path) -> Any:
        arguments = {"run": study.run.path, "listen": "127.0.0.1:0"} | options
        flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        return wardround("wardround", "coordinator", file or study.study, *flags, first=without_tensorflow)

    return run


@pytest.fixture
def site(study: Any, tmp_path: Path, wardround: Callable[..., Any], without_tensorflow: Path) -> Callable[..., Any]:
    """Calls `wardround-site start` with these options in place of its usual ones."""

    def run(file: Path | None = None, *, approve: bool = True, **options: str | Path) -> Any:
        arguments = {
            "site": "east",
            "data": study.data / "east",
            "identity": study.run.identity / "sites" / "east",
            "work": tmp_path / "work",
            "coordinator": study.address,
        } | options
        flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        if approve:
            place = [
                part for name, value in arguments.items() if name != "coordinator" for part in (f"--{name}", value)
            ]
            wardround("wardround-site", "approve", file or study.study, *place, "--by", "Kim", first=without_tensorflow)
        return wardround("wardround-site", "start", file or study.study, *flags, first=without_tensorflow)

    return run


@pytest.fixture
def copy(study: Any, tmp_path: Path) -> Path:
    """A copy of a site's data, to spoil."""
    return Path(shutil.copytree(study.data / "east", tmp_path / "east"))


def test_a_truncated_image_is_named(site: Callable[..., Any], copy: Path) -> None:
    torn = copy / "images" / "0002.tif"
    torn.write_bytes(torn.read_bytes()[:-3000])
    result = site(data=copy)
    assert_refused(
        result.returncode,
        result.stderr,
        3,
        f"({copy}): the study asks for all 5",
        "E101 image 0002.tif",
        "copy it again",
    )


def test_an_image_without_label_is_named(site: Callable[..., Any], copy: Path) -> None:
    (copy / "labels" / "0003.tif").unlink()
    result = site(data=copy)
    assert_refused(result.returncode, result.stderr, 3, f"({copy})", "E201 case 0003: has no label", "Add the label")


@pytest.mark.parametrize("side", ["coordinator", "site"])
def test_a_misspelt_study_key_is_named_with_its_line_and_a_suggestion(
    request: pytest.FixtureRequest, side: str, study: Any, tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(study.study.read_text().replace("batch_size: 4", "bach_size: 4"))
    result = request.getfixturevalue(side)(file)
    assert_refused(result.returncode, result.stderr, 2, f"({file}:6)", "training.bach_size", "batch_size")


def test_a_study_that_nobody_approved_is_refused(site: Callable[..., Any], study: Any) -> None:
    result = site(approve=False)
    assert_refused(
        result.returncode, result.stderr, 11, "study short has not been approved here", "wardround-site approve", "--by"
    )


def test_a_study_that_violates_the_policy_is_refused(site: Callable[..., Any], tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("minimum_cohort: 2\n")
    site(policy=policy)  # approved under this policy, which is met; then it is changed
    policy.write_text("secure_aggregation: required\n")
    result = site(policy=policy, approve=False)
    assert_refused(result.returncode, result.stderr, 12, str(policy), "secure_aggregation: required")


def test_a_port_in_use_is_named(coordinator: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        result = coordinator(listen=address)
    assert_refused(result.returncode, result.stderr, 4, f"error: {address}: cannot listen there", "--listen")


def test_the_certificate_of_another_site_is_refused(site: Callable[..., Any], study: Any) -> None:
    identity = study.run.identity / "sites" / "north"
    result = site(identity=identity)
    assert_refused(result.returncode, result.stderr, 5, str(identity), "'north'", "'east'", "give this site's own")


def test_a_site_that_is_not_in_the_study_is_refused(site: Callable[..., Any]) -> None:
    result = site(site="south")
    assert_refused(result.returncode, result.stderr, 2, "--site south", "east, north", "correct the name")


def test_a_run_folder_in_use_is_refused_and_left_alone(coordinator: Callable[..., Any], study: Any) -> None:
    study.run.path.mkdir(exist_ok=True)
    with study.run.locked():
        study.run.write_status({"study": "short", "state": "training"})
        result = coordinator()
        assert study.status()["state"] == "training"
    assert_refused(result.returncode, result.stderr, 7, str(study.run.path), "another coordinator", "wardround status")


def test_a_holdout_folder_that_does_not_exist_is_named(coordinator: Callable[..., Any], tmp_path: Path) -> None:
    result = coordinator(holdout=tmp_path / "nowhere")
    assert_refused(result.returncode, result.stderr, 3, str(tmp_path / "nowhere"), "--holdout")


# By a coordinator that runs. ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refused(setting: Callable[[str], Any], short_study: str) -> dict[str, Any]:
    """Exit code and output of three sites that a coordinator has no use for, and of all that then go on."""
    study, stranger = setting(short_study), setting(short_study)
    study.identities("east", "north")
    stranger.identities("east", "north")
    other = study.folder / "other.yaml"
    other.write_text(short_study.replace("seed: 3", "seed: 4"))
    data = Path(shutil.copytree(study.data / "east", study.folder / "spoiled"))
    coordinator = study.coordinator()
    spoiled = study.site("east", data=data)
    study.until(lambda _: "5 training" in spoiled.said(), spoiled)
    for image in (data / "images").iterdir():
        image.write_bytes(image.read_bytes()[:-3000])
    processes = {
        "spoiled data": spoiled,
        "another plan": study.site("east", study=other, work=study.folder / "other"),
        "another authority": study.site("north", identity=stranger.run.identity / "sites" / "north"),
    }
    ended = {name: (process.end(), process.said()) for name, process in processes.items()}
    # That a process is gone is known before its line is seen to end.
    ended["east"] = study.until(lambda status: not status["sites"]["east"]["connected"])["sites"]["east"]
    sites = study.site("east", "north")
    return ended | {name: (one.end(), one.said()) for name, one in (("sites", sites), ("coordinator", coordinator))}


def test_a_site_with_another_plan_is_refused(refused: dict[str, Any]) -> None:
    code, text = refused["another plan"]
    assert_refused(code, text, 6, "plan:", "use the coordinator's study file and the same version")
    assert text.count("the coordinator runs study") == 1, text
    assert refused["coordinator"][1].count("east came with another plan") == 1


def test_a_site_of_another_authority_gives_up(refused: dict[str, Any]) -> None:
    assert_refused(*refused["another authority"], 5, "127.0.0.1", "issuer certificate", "get a new identity")


def test_a_site_whose_images_are_damaged_in_the_meantime_says_so_on_both_sides(refused: dict[str, Any]) -> None:
    assert_refused(*refused["spoiled data"], 3, "site east: case 000", ".tif: cannot be read")
    east = refused["east"]
    assert (east["connected"], east["stage"], east["reason"]) == (False, "failed", "its data can no longer be read")


def test_the_coordinator_goes_on_after_refusing(refused: dict[str, Any]) -> None:
    assert [refused[name][0] for name in ("sites", "coordinator")] == [0, 0], refused["coordinator"][1]
    assert "Traceback" not in refused["coordinator"][1]
