"""Sample pictures of the holdout: what is kept, how it looks, and that it stays bounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.watching.samples import (
    KINDS,
    MOST_ROUNDS,
    PALETTE,
    Sampler,
    difference,
    kept_rounds,
    read_samples,
    sampled_rounds,
    write_samples,
)

TRUTH = np.array([[0, 0, 1, 1], [0, 0, 1, 2]], np.uint8)
PREDICTION = np.array([[0, 1, 1, 0], [0, 0, 2, 2]], np.uint8)


def sampler_of(shape: tuple[int, int, int], *, planar: bool, names: tuple[str, ...] = ("0001-east",)) -> Sampler:
    """A sampler that has taken its cases once; the label is in the last third along z."""
    sampler = Sampler(names, [name.split("-")[1] for name in names], planar=planar)
    truth = np.zeros(shape, np.uint8)
    truth[shape[0] * 2 // 3 :, : shape[1] // 2] = 1
    for index in range(len(names)):
        sampler.take(
            index, lambda: np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(*shape, 1), truth, truth
        )
    return sampler


def test_the_pictures_of_a_plane_are_read_as_they_were_written(tmp_path: Path) -> None:
    sampler = Sampler(["0001-east", "0002-x"], ["east", None], planar=True)
    asked: list[int] = []
    for _ in range(2):  # a second round asks for no image again
        sampler.take(0, lambda: (asked.append(1), np.ones((1, 2, 4, 3), np.float32))[1], TRUTH[None], PREDICTION[None])
    assert asked == [1]
    write_samples(tmp_path, 7, ["background", "a", "b"], sampler.taken([0.5, float("nan")]))
    (sample,) = read_samples(tmp_path, 7)
    assert (sample.case, sample.site, sample.dice) == ("0001-east", "east", 0.5)
    (view,) = sample.slices
    assert view.z is None
    assert np.array_equal(np.asarray(Image.open(view.truth)), PALETTE[TRUTH])
    assert np.array_equal(np.asarray(Image.open(view.prediction)), PALETTE[PREDICTION])
    shown = np.asarray(Image.open(view.difference))
    assert np.array_equal(shown, difference(TRUTH, PREDICTION))
    both, only_predicted, missed, neither = shown[0, 2], shown[0, 1], shown[0, 3], shown[0, 0]
    assert both.tolist() == [255, 255, 255] and neither.tolist() == [0, 0, 0]
    assert only_predicted.tolist() == shown[1, 2].tolist() != missed.tolist()


def test_of_a_volume_the_slices_with_the_label_are_shown_and_large_ones_are_thinned(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, ["background", "a"], sampler_of((30, 600, 500), planar=False).taken([1.0]))
    (sample,) = read_samples(tmp_path, 1)
    assert [view.z for view in sample.slices] == [20, 22, 27]
    sizes = {Image.open(getattr(view, kind)).size for view in sample.slices for kind in KINDS}
    assert sizes == {(167, 200)}  # every third voxel


def test_rounds_are_kept_sparsely_with_the_first_and_the_newest(tmp_path: Path) -> None:
    taken = sampler_of((1, 8, 8), planar=True).taken([1.0])
    for number in range(1, 41):
        write_samples(tmp_path, number, ["background", "a"], taken)
    kept = sampled_rounds(tmp_path)
    assert (kept[0], kept[-1]) == (1, 40)
    assert len(kept) <= MOST_ROUNDS
    assert all(read_samples(tmp_path, number) for number in kept)
    assert len(kept_rounds(range(1, 10_001))) <= MOST_ROUNDS


def test_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.watching.samples.MOST_BYTES", 2000)
    names = ("0001-east", "0002-north", "0003-south")
    write_samples(tmp_path, 1, ["background", "a"], sampler_of((1, 64, 64), planar=True, names=names).taken([1.0] * 3))
    assert 1 <= len(read_samples(tmp_path, 1)) < 3
    pictures = list((tmp_path / "samples" / "round-0001").glob("*.png"))
    assert sum(path.stat().st_size for path in pictures) <= 2000


def test_a_full_disk_costs_the_pictures_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "samples").write_text("in the way")
    write_samples(tmp_path, 1, ["background"], sampler_of((1, 8, 8), planar=True).taken([1.0]))
    assert "the sample pictures of round 1 cannot be written" in caplog.text
    assert read_samples(tmp_path, 1) == ()


def test_an_index_that_is_damaged_or_points_elsewhere_shows_nothing_of_it(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, ["background"], sampler_of((1, 8, 8), planar=True).taken([1.0]))
    index = tmp_path / "samples" / "round-0001" / "index.json"
    content = json.loads(index.read_text())
    content["samples"][0]["slices"][0]["image"] = "../../../secret.png"
    index.write_text(json.dumps(content))
    assert read_samples(tmp_path, 1)[0].slices[0].image == index.parent / "secret.png"
    index.write_text("{")
    assert read_samples(tmp_path, 1) == ()
