"""What holds for all augmentations, and the older ones each on an image whose outcome is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from common.imaging.augmentation import VALUE_CHANGES, ValueChange, augment, chain, elastic
from common.study import AUGMENTATIONS

BATCH = 400
SEED = (3, 4)


def run(
    image: np.ndarray, label: np.ndarray, names: tuple[str, ...], *, count: int = BATCH, through_plane: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The same example `count` times, each varied on its own."""
    images, labels = augment(
        tf.constant(np.stack([image] * count), tf.float32),
        tf.constant(np.stack([label] * count), tf.uint8),
        tf.constant(SEED, tf.int32),
        names,
        through_plane=through_plane,
    )
    return images.numpy(), labels.numpy()


def picture(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(5, 2, (16, 16, channels)).astype(np.float32)


def blank(image: np.ndarray) -> np.ndarray:
    return np.zeros(image.shape[:-1], np.uint8)


def changed(image: np.ndarray, images: np.ndarray) -> np.ndarray:
    return np.array([not np.array_equal(image, other) for other in images])


def assert_share(chosen: np.ndarray, expected: float) -> None:
    """Within four standard deviations of a binomial share."""
    assert abs(chosen.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(chosen))


def test_flip_gives_all_eight_orientations_of_a_square_and_takes_the_label_along() -> None:
    image = np.array([[1, 2], [3, 4]], np.float32)[..., np.newaxis]
    images, labels = run(image, image[..., 0].astype(np.uint8), ("flip",))
    assert np.array_equal(images[..., 0], labels)
    seen = {tuple(label.ravel().tolist()) for label in labels}
    turns = [np.rot90(image[..., 0], k) for k in range(4)]
    assert seen == {tuple(t.ravel().tolist()) for turn in turns for t in (turn, turn.T)}


def test_flip_keeps_the_axes_of_a_rectangle() -> None:
    image = np.arange(15, dtype=np.float32).reshape(3, 5, 1)
    images, labels = run(image, image[..., 0].astype(np.uint8), ("flip",))
    assert np.array_equal(images[..., 0], labels)
    wanted = {tuple(image[::y, ::x].ravel().tolist()) for y in (1, -1) for x in (1, -1)}
    assert {tuple(i.ravel().tolist()) for i in images} == wanted


def test_flip_mirrors_volumes_along_each_axis() -> None:
    image = np.arange(60, dtype=np.float32).reshape(3, 4, 5, 1)
    images, labels = run(image, image[..., 0].astype(np.uint8), ("flip",))
    assert np.array_equal(images[..., 0], labels)
    mirrored = [image[::z, ::y, ::x] for z in (1, -1) for y in (1, -1) for x in (1, -1)]
    assert {tuple(i.ravel().tolist()) for i in images} == {tuple(m.ravel().tolist()) for m in mirrored}


def bar() -> np.ndarray:
    """A long bar through the centre of 65 x 65 pixels."""
    label = np.zeros((65, 65), np.uint8)
    label[30:35, 12:53] = 1
    return label


def direction(mask: np.ndarray) -> float:
    """The angle of a mask's long axis in degrees, -90 to 90."""
    y, x = np.argwhere(mask).T - 32.0
    return float(np.degrees(0.5 * np.arctan2(2 * (x * y).sum(), (x * x).sum() - (y * y).sum())))


def test_rotate_turns_half_of_the_images_by_any_angle_about_the_centre() -> None:
    label = bar()
    images, labels = run(label[..., np.newaxis].astype(np.float32), label, ("rotate",))
    turned = changed(label, labels)
    assert_share(turned, 0.5)
    angles = np.array([direction(mask) for mask in labels])
    assert np.histogram(angles[turned], bins=6, range=(-90, 90))[0].min() > 10
    for image, moved in zip(images[turned], labels[turned], strict=True):
        assert abs(int(moved.sum()) - int(label.sum())) < 15
        assert np.abs(np.argwhere(moved).mean(axis=0) - 32).max() < 0.3
        # The label follows the image.
        assert ((image[..., 0] > 0.5) == moved).mean() > 0.99


def test_rotate_fills_from_the_mirror_image() -> None:
    image = np.ones((16, 24, 2), np.float32)
    images, labels = run(image, np.full((16, 24), 3, np.uint8), ("rotate", "scale"))
    np.testing.assert_allclose(images, 1.0, atol=1e-6)
    assert (labels == 3).all()


def test_rotate_turns_volumes_about_each_axis_by_up_to_15_degrees() -> None:
    rod = np.zeros((33, 33, 33), np.uint8)
    volumes = {}
    for axis in range(3):  # a rod along one axis shows the turns about the other two
        window: list[slice] = [slice(15, 18)] * 3
        window[axis] = slice(6, 27)
        volumes[axis] = rod.copy()
        volumes[axis][tuple(window)] = 1
    tilts = {}
    for axis, label in volumes.items():
        images, labels = run(label[..., np.newaxis].astype(np.float32), label, ("rotate",), count=120)
        offsets = [np.argwhere(mask) - 16.0 for mask in labels]
        slopes = np.array([[np.polyfit(o[:, axis], o[:, other], 1)[0] for other in range(3)] for o in offsets])
        tilts[axis] = np.degrees(np.arctan(slopes))
        assert ((images[..., 0] > 0.5) == labels).mean() > 0.999
    for axis, tilt in tilts.items():
        others = [other for other in range(3) if other != axis]
        # About 20 of 120 turn about each axis, never two at once, and by 15 degrees at most (1 for the voxels).
        for other in others:
            assert 8 < (np.abs(tilt[:, other]) > 1.5).sum() < 36
            assert 8 < np.abs(tilt[:, other]).max() < 16
        assert not ((np.abs(tilt[:, others[0]]) > 1.5) & (np.abs(tilt[:, others[1]]) > 1.5)).any()


def test_rotate_stays_in_the_plane_when_slices_are_thick() -> None:
    image = np.random.default_rng(0).normal(size=(5, 16, 16, 1)).astype(np.float32)
    image[2] = 7.0
    images, _ = run(image, blank(image), ("rotate",), through_plane=False)
    assert_share(changed(image, images), 0.5)
    np.testing.assert_allclose(images[:, 2], 7.0, atol=1e-5)
    assert not np.isclose(images[:, [0, 1, 3, 4]], 7.0).any()


def test_scale_changes_the_size_of_some_within_its_range() -> None:
    label = np.zeros((64, 64), np.uint8)
    label[22:42, 22:42] = 1
    images, labels = run(label[..., np.newaxis].astype(np.float32), label, ("scale",))
    scaled = changed(label[..., np.newaxis], images)
    assert_share(scaled, 0.3)
    sides = np.sqrt(images.sum(axis=(1, 2, 3))) / 20
    assert sides[scaled].min() == pytest.approx(0.8, abs=0.03)
    assert sides[scaled].max() == pytest.approx(1.25, abs=0.03)
    assert ((images[..., 0] > 0.5) == labels).mean() > 0.99


def test_gamma_keeps_range_and_order() -> None:
    image = picture()
    images, _ = run(image, blank(image), ("gamma",))
    chosen = changed(image, images)
    assert_share(chosen, 0.3)
    np.testing.assert_allclose(images.min(axis=(1, 2, 3)), image.min(), atol=1e-5)
    np.testing.assert_allclose(images.max(axis=(1, 2, 3)), image.max(), atol=1e-5)
    relative = (image - image.min()) / (image.max() - image.min())
    middle = (relative > 0.2) & (relative < 0.8)
    powers = []
    for curved in images[chosen]:
        relative_after = (curved[middle] - image.min()) / (image.max() - image.min())
        exponents = np.log(relative_after) / np.log(relative[middle])
        assert np.ptp(exponents) < 1e-3  # one power for the whole image
        powers.append(exponents.mean())
    assert 0.7 <= min(powers) < 0.75
    assert 1.45 < max(powers) <= 1.5


def test_contrast_is_one_line_a_channel_near_that_of_the_image() -> None:
    image = picture()
    images, _ = run(image, blank(image), ("contrast",))
    chosen = changed(image, images)
    assert_share(chosen, 0.3)
    gains, shifts = [], []
    for other in images[chosen]:
        lines = [np.polyfit(image[..., c].ravel(), other[..., c].ravel(), 1) for c in range(3)]
        for channel, line in enumerate(lines):
            np.testing.assert_allclose(np.polyval(line, image[..., channel]), other[..., channel], atol=1e-4)
        gain = [line[0] for line in lines]
        assert 0 < np.ptp(gain) < 0.1
        gains += gain
        shifts += [(np.polyval(line, image.mean()) - image.mean()) / image.std() for line in lines]
    assert 0.7 <= min(gains) < 0.8 < 1.2 < max(gains) <= 1.3
    assert -0.25 <= min(shifts) < -0.15 < 0.15 < max(shifts) <= 0.25


def test_noise_is_normal_and_its_strength_follows_the_image() -> None:
    image = np.tile(np.array([0.0, 100.0], np.float32), (64, 32))[..., np.newaxis]  # standard deviation 50
    images, _ = run(image, blank(image), ("noise",), count=200)
    chosen = changed(image, images)
    assert_share(chosen, 0.3)
    noise = (images - image)[chosen]
    strengths = noise.std(axis=(1, 2, 3)) / 50
    assert strengths.min() < 0.06
    assert 0.27 < strengths.max() < 0.31
    normal = noise / (strengths[:, np.newaxis, np.newaxis, np.newaxis] * 50)
    assert abs(normal.mean()) < 0.01
    assert np.mean(np.abs(normal) < 1) == pytest.approx(0.683, abs=0.01)
    # Each example has its own noise.
    assert np.abs(np.corrcoef(normal.reshape(len(normal), -1)) - np.eye(len(normal))).max() < 0.1


def test_blur_is_a_gaussian_of_half_to_one_voxel_in_the_plane() -> None:
    image = np.zeros((3, 15, 15, 1), np.float32)
    image[1, 7, 7] = 1.0
    images, _ = run(image, blank(image), ("blur",))
    chosen = changed(image, images)
    assert_share(chosen, 0.2)
    assert not images[:, [0, 2]].any()
    sigmas = []
    for spot in images[chosen][:, 1, ..., 0]:
        assert spot.sum() == pytest.approx(1.0, abs=1e-5)
        sigma = np.sqrt(-0.5 / np.log(spot[7, 8] / spot[7, 7]))
        expected = ndimage.gaussian_filter(image[1, ..., 0], sigma, radius=3)
        np.testing.assert_allclose(spot, expected, atol=1e-5)
        sigmas.append(sigma)
    assert 0.5 <= min(sigmas) < 0.6
    assert 0.9 < max(sigmas) <= 1.0


def test_blur_repeats_the_border_and_takes_patches_smaller_than_its_filter() -> None:
    for shape in ((2, 2, 1), (9, 30, 3)):
        image = np.full(shape, 4.0, np.float32)
        np.testing.assert_allclose(run(image, blank(image), ("blur",))[0], 4.0, rtol=1e-6)


def test_every_augmentation_of_the_study_file_is_applied_by_one_step() -> None:
    assert sorted({step.name for step in VALUE_CHANGES} | {"flip", "rotate", "scale", "elastic"}) == sorted(
        AUGMENTATIONS
    )


def test_the_page_on_augmentation_has_each_in_the_order_of_application_with_its_chance() -> None:
    page = (Path(__file__).parents[3] / "docs" / "augmentation.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    chances = {name.strip(" `"): chance.strip() for name, chance in rows}
    assert list(chances) == ["flip", "rotate", "scale", "elastic", *(step.name for step in VALUE_CHANGES)]
    assert float(chances["elastic"]) == elastic.PROBABILITY
    for step in VALUE_CHANGES:
        assert float(chances[step.name]) == step.probability


SHAPES = [
    (6, 32, 32, 3),
    (6, 24, 32, 1),
    (3, 17, 9, 4),
    (4, 8, 16, 16, 1),
    (2, 5, 11, 7, 3),
    (2, 1, 16, 16, 1),
    (0, 16, 16, 3),
    (0, 8, 8, 8, 1),
]
SHAPES_OF_ALL = [(3, 17, 9, 4), (2, 5, 11, 7, 3), (0, 16, 16, 3)]  # each is compiled anew, which takes seconds


@pytest.mark.parametrize("names", [*((name,) for name in AUGMENTATIONS), AUGMENTATIONS], ids="+".join)
def test_every_augmentation_keeps_shapes_types_classes_and_finite_values(names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES if len(names) == 1 else SHAPES_OF_ALL:
        images = tf.constant(rng.normal(size=shape), tf.float32)
        labels = tf.constant(rng.integers(0, 3, shape[:-1]), tf.uint8)
        for through_plane in (True, False) if {"rotate", "elastic"} & set(names) and len(shape) == 5 else (True,):
            new_images, new_labels = augment(images, labels, tf.constant(SEED), names, through_plane=through_plane)
            assert (new_images.shape, new_images.dtype) == (images.shape, tf.float32)
            assert (new_labels.shape, new_labels.dtype) == (labels.shape, tf.uint8)
            assert np.isfinite(new_images.numpy()).all()
            assert set(np.unique(new_labels)) <= {0, 1, 2}


@pytest.mark.parametrize("names", [*((name,) for name in AUGMENTATIONS), AUGMENTATIONS], ids="+".join)
@pytest.mark.parametrize("shape", [(20, 16, 16, 3), (20, 6, 8, 10, 3)], ids=["2d", "3d"])
def test_the_seed_decides_and_sizes_may_be_unknown_to_the_graph(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    images = tf.constant(rng.normal(size=shape), tf.float32)
    labels = tf.constant(rng.integers(0, 3, shape[:-1]), tf.uint8)
    # Whether a patch is square must be known to transpose it.
    unknown = [None, *shape[1:-1]] if "flip" in names else [None] * (len(shape) - 1)

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([*unknown, shape[-1]], tf.float32),
            tf.TensorSpec(unknown, tf.uint8),
            tf.TensorSpec([2], tf.int32),
        ],
    )
    def step(images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return augment(images, labels, seed, names)

    eager = augment(images, labels, tf.constant(SEED), names)
    graph = step(images, labels, tf.constant(SEED))
    np.testing.assert_allclose(eager[0], graph[0], atol=1e-5)
    assert (eager[1].numpy() != graph[1].numpy()).mean() < 1e-3  # a coordinate on the edge between two voxels
    assert np.array_equal(graph[0], step(images, labels, tf.constant(SEED))[0])
    assert not np.array_equal(graph[0], step(images, labels, tf.constant((SEED[0] + 1, SEED[1])))[0])
    assert not np.array_equal(graph[0], images)


@pytest.mark.parametrize("step", VALUE_CHANGES, ids=lambda step: step.name)
def test_value_changes_reach_their_share_of_the_examples_and_no_label(step: ValueChange) -> None:
    image = picture()
    label = np.random.default_rng(2).integers(0, 3, image.shape[:-1]).astype(np.uint8)
    images, labels = run(image, label, (step.name,))
    assert_share(changed(image, images), step.probability)
    assert (labels == label).all()
    # Each example has numbers of its own.
    assert len(np.unique(images[changed(image, images)].reshape(-1, image.size), axis=0)) > 1


@pytest.mark.parametrize(
    "names", [*((name,) for name in AUGMENTATIONS if name not in ("noise", "cutout"))], ids="+".join
)
def test_the_label_goes_where_the_image_goes(names: tuple[str, ...]) -> None:
    z, y, x = np.mgrid[:12, :40, :40]
    for blob in (
        np.hypot(y[0] - 13, x[0] - 22) < 9,
        np.sqrt(((z - 6) * 2) ** 2 + (y - 13) ** 2 + (x - 22) ** 2) < 9,
    ):
        image = np.repeat(blob[..., np.newaxis].astype(np.float32), 3, axis=-1)
        images, labels = run(image, blob.astype(np.uint8), names, count=60)
        lowest, highest = images[..., 0].min(axis=(1, 2), keepdims=True), images[..., 0].max(axis=(1, 2), keepdims=True)
        if blob.ndim == 3:
            lowest, highest = lowest.min(axis=3, keepdims=True), highest.max(axis=3, keepdims=True)
        bright = images[..., 0] > (lowest + highest) / 2
        assert (bright == labels).mean() > 0.98


def test_constant_images_stay_finite() -> None:
    image = np.full((16, 16, 3), 2.5, np.float32)
    np.testing.assert_allclose(run(image, blank(image), AUGMENTATIONS)[0], 2.5, rtol=1e-5)


def test_no_names_change_nothing() -> None:
    image = picture()
    assert not changed(image, run(image, blank(image), ())[0]).any()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="warp"):
        run(picture(), blank(picture()), ("flip", "warp"))


def test_batches_of_another_form_are_refused() -> None:
    seed = tf.constant(SEED)
    with pytest.raises(ValueError, match="batch of 2D or 3D images"):
        augment(tf.zeros((16, 16, 3)), tf.zeros((16, 16), tf.uint8), seed, AUGMENTATIONS)
    with pytest.raises(ValueError, match="batch of 2D or 3D images"):
        augment(tf.zeros((2, 16, 16, 3)), tf.zeros((2, 16, 16, 1), tf.uint8), seed, AUGMENTATIONS)

    @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, None], tf.float32)])
    def step(images: tf.Tensor) -> tf.Tensor:
        return augment(images, tf.zeros((2, 16, 16), tf.uint8), seed, AUGMENTATIONS)[0]

    with pytest.raises(ValueError, match="known number of channels"):
        step(tf.zeros((2, 16, 16, 3)))


@pytest.mark.parametrize("shape", [(6, 4, 16, 16, 3), (6, 2, 6, 12, 10, 1)], ids=["2d", "3d"])
def test_the_seed_alone_decides_in_a_graph_and_in_a_parallel_dataset(shape: tuple[int, ...]) -> None:
    images = tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)
    labels = tf.cast(images[..., 0] > 0, tf.uint8)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return augment(images, labels, tf.stack([11, tf.cast(number, tf.int32)]), AUGMENTATIONS)

    alone = [step(images[n], labels[n], tf.constant(n, tf.int64)) for n in range(6)]
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).enumerate()
    mapped = dataset.map(lambda n, pair: step(*pair, n), num_parallel_calls=4, deterministic=True)
    for _ in range(2):
        for (image, label), (mapped_image, mapped_label) in zip(alone, mapped, strict=True):
            assert np.array_equal(image, mapped_image)
            assert np.array_equal(label, mapped_label)
    assert not np.array_equal(alone[0][0], step(images[0], labels[0], tf.constant(1, tf.int64))[0])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_operation_has_the_same_bits_in_a_graph_and_in_a_dataset(name: str) -> None:
    def vary(images: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        labels = tf.zeros(tf.shape(images)[:-1], tf.uint8)
        return augment(images, labels, tf.stack([11, tf.cast(number, tf.int32)]), (name,), always=True)[0]

    for shape in ((3, 4, 16, 16, 3), (3, 2, 6, 12, 10, 3)):
        images = tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)
        graph = tf.function(vary)
        mapped = (
            tf.data.Dataset.from_tensor_slices(images).enumerate().map(lambda n, batch, graph=graph: graph(batch, n))
        )
        for number, batch in enumerate(mapped):
            assert np.array_equal(batch, graph(images[number], tf.constant(number, tf.int64)))
            # TensorFlow may simplify a graph before it is compiled, which changes last bits.
            close = 1e-4 if name in ("rotate", "scale") else 1e-5
            np.testing.assert_allclose(batch, vary(images[number], tf.constant(number)), atol=close)


def test_adding_an_augmentation_does_not_change_what_the_others_draw() -> None:
    label = bar()
    image = label[..., np.newaxis].astype(np.float32)
    assert np.array_equal(run(image, label, ("rotate",))[1], run(image, label, ("noise", "gamma", "rotate"))[1])
    others = tuple(name for name in AUGMENTATIONS if name not in ("flip", "scale", "elastic"))
    assert np.array_equal(run(image, label, ("rotate",))[1], run(image, label, others)[1])


@pytest.mark.parametrize("names", [("flip", "rotate", "scale", "elastic"), AUGMENTATIONS], ids="+".join)
@pytest.mark.parametrize("shape", [(6, 16, 16, 3), (4, 6, 12, 10, 1)], ids=["2d", "3d"])
def test_without_a_compiler_the_same_comes_out(
    shape: tuple[int, ...], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not chain.compiler_is_there():
        pytest.skip("this TensorFlow cannot compile for the CPU")
    images = tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)
    labels = tf.cast(images[..., 0] > 0, tf.uint8)
    compiled = augment(images, labels, tf.constant(SEED), names)
    monkeypatch.setattr(chain, "compiler_is_there", lambda: False)
    plain = augment(images, labels, tf.constant(SEED), names)
    np.testing.assert_allclose(compiled[0], plain[0], atol=1e-3)
    assert (compiled[1].numpy() != plain[1].numpy()).mean() < 1e-2  # a coordinate on the edge between two voxels


def test_an_example_does_not_depend_on_the_values_of_its_neighbours_in_the_batch() -> None:
    images = np.random.default_rng(0).normal(size=(6, 16, 24, 3)).astype(np.float32)
    labels = tf.zeros(images.shape[:-1], tf.uint8)
    together = augment(tf.constant(images), labels, tf.constant(SEED), AUGMENTATIONS)[0].numpy()
    images[[0, 2, 3]] = np.nan
    alone = augment(tf.constant(images), labels, tf.constant(SEED), AUGMENTATIONS)[0].numpy()
    assert np.array_equal(together[[1, 4, 5]], alone[[1, 4, 5]])
