"""TIFF, OME-TIFF and ImageJ TIFF: axes, spacing, colours, pyramids, and that nothing missing passes for pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.imaging.readers import tiff
from common.imaging.volume import Volume, scaling_affine

Array = npt.NDArray[Any]
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"needs ../shared/data/{folder}")


def voxels(*shape: int, dtype: npt.DTypeLike = np.uint8) -> Array:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def written(folder: Path, array: Array, **options: Any) -> Path:
    path = folder / ("a.ome.tif" if options.get("ome") else "a.tif")
    tifffile.imwrite(path, array, **{"photometric": "minisblack", **options})
    return path


def read(path: Path, level: int = 0) -> Volume:
    return tiff.read(path, is_label=False, level=level)


# Axes: the same (z, y, x, channel) however they are stored

STACK = voxels(5, 11, 7, 3)
ZYX, ZCYX = STACK[..., 0], np.moveaxis(STACK, 3, 1)
RGB = {"photometric": "rgb"}
LAYOUTS: dict[str, tuple[Array, dict[str, Any], Array]] = {
    "pages without metadata": (ZYX, {"metadata": None}, STACK[..., :1]),
    "pages with a shape alone": (ZYX, {}, STACK[..., :1]),
    "pages with a shape of length 1": (ZYX[:, None], {}, STACK[..., :1]),
    "compressed pages without metadata": (ZYX, {"metadata": None, "compression": "zlib"}, STACK[..., :1]),
    "one description of a whole stack": (ZYX, {"metadata": {"axes": "ZYX", "truncated": True}}, STACK[..., :1]),
    "named axes": (ZCYX, {"metadata": {"axes": "ZCYX"}}, STACK),
    "named axes, channels first": (np.moveaxis(STACK, 3, 0), {"metadata": {"axes": "CZYX"}}, STACK),
    "named axes, x before y": (STACK.transpose(0, 2, 1, 3), {"metadata": {"axes": "ZXYC"}}, STACK),
    "named channels of a slice": (ZCYX[0], {"metadata": {"axes": "CYX"}}, STACK[:1]),
    "OME volume": (ZYX, {"ome": True, "metadata": {"axes": "ZYX"}}, STACK[..., :1]),
    "OME XYCZT": (ZCYX, {"ome": True, "metadata": {"axes": "ZCYX"}}, STACK),
    "OME XYZCT": (np.moveaxis(STACK, 3, 0), {"ome": True, "metadata": {"axes": "CZYX"}}, STACK),
    "OME with a time axis of 1": (ZCYX[None], {"ome": True, "metadata": {"axes": "TZCYX"}}, STACK),
    "OME RGB": (STACK, {"ome": True, "metadata": {"axes": "ZYXS"}, **RGB}, STACK),
    "OME RGB in planes": (ZCYX, {"ome": True, "metadata": {"axes": "ZSYX"}, "planarconfig": "separate", **RGB}, STACK),
    "OME slice": (ZYX[0], {"ome": True}, STACK[:1, ..., :1]),
    "ImageJ volume": (ZYX, {"imagej": True, "metadata": {"axes": "ZYX"}}, STACK[..., :1]),
    "ImageJ hyperstack": (ZCYX, {"imagej": True, "metadata": {"axes": "ZCYX"}}, STACK),
    "ImageJ channels of a slice": (ZCYX[0], {"imagej": True, "metadata": {"axes": "CYX"}}, STACK[:1]),
    "ImageJ RGB": (STACK, {"imagej": True, "metadata": {"axes": "ZYXS"}, **RGB}, STACK),
    "RGB": (STACK[0], RGB, STACK[:1]),
    "RGB in planes": (ZCYX[0], {"planarconfig": "separate", **RGB}, STACK[:1]),
    "RGB pages": (STACK, {"metadata": None, **RGB}, STACK),
    "RGB pages in planes": (ZCYX, {"metadata": None, "planarconfig": "separate", **RGB}, STACK),
    "channels interleaved": (STACK[0], {"planarconfig": "contig", "metadata": None}, STACK[:1]),
    "BigTIFF": (ZCYX, {"bigtiff": True, "ome": True, "metadata": {"axes": "ZCYX"}}, STACK),
    "big-endian": (ZYX, {"byteorder": ">", "metadata": None}, STACK[..., :1]),
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    # ImageJ has 8-bit RGB alone.
    [(layout, dtype) for layout in LAYOUTS for dtype in ("u1", "u2", "f4") if layout != "ImageJ RGB" or dtype == "u1"],
)
def test_every_layout_gives_the_same_volume(tmp_path: Path, layout: str, dtype: str) -> None:
    stored, options, expected = LAYOUTS[layout]
    volume = read(written(tmp_path, stored.astype(dtype), **options))
    assert volume.array.dtype == np.dtype(dtype)
    assert np.array_equal(volume.array, expected.astype(dtype))
    assert volume.spacing == (1.0, 1.0, 1.0)
    assert np.array_equal(volume.affine, np.eye(4))


def test_slices_written_one_by_one_are_a_stack(tmp_path: Path) -> None:
    for options in ({}, {"compression": "zlib"}, {"compression": "zlib", "metadata": None}, {"contiguous": False}):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            for plane in ZYX:
                writer.write(plane, photometric="minisblack", **options)
        assert np.array_equal(read(tmp_path / "a.tif").array[..., 0], ZYX)


def test_imagej_virtual_stack_keeps_all_slices_in_its_first_page(tmp_path: Path) -> None:
    description = "ImageJ=1.53t\nimages=5\nslices=5\nunit=micron\nspacing=2.5\n"
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, ZYX[0], description=description, metadata=None)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].dataoffsets[0] + ZYX[0].nbytes == path.stat().st_size
    with path.open("ab") as stream:
        stream.write(ZYX[1:].tobytes())
    volume = read(path)
    assert np.array_equal(volume.array[..., 0], ZYX)
    assert volume.spacing == (2.5, 1.0, 1.0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"last pixel|never written"):
        read(path)


def test_imagej_images_that_are_not_said_to_be_slices_are_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for i, plane in enumerate(ZYX):
            writer.write(plane, description=None if i else "ImageJ=1.53t\nimages=5\n", metadata=None)
    assert np.array_equal(read(path).array[..., 0], ZYX)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
LOSSLESS = [None, "packbits", "lzw", "zlib", "zstd", "lzma"]
DTYPES = ["uint8", "uint16", "uint32", "int16", "int32", "float32", "float64"]


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_volume_survives_the_round_trip(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["ome", "imagej", "shaped"]), label="kind")
    # tifffile writes ImageJ files whose last axis is 1 as if that were a sample of a pixel.
    shape = data.draw(SHAPES.filter(lambda zcyx: kind != "imagej" or zcyx[3] > 1), label="(z, c, y, x)")
    dtype = data.draw(st.sampled_from(["uint8", "uint16", "float32"] if kind == "imagej" else DTYPES), label="dtype")
    compression = None if kind == "imagej" else data.draw(st.sampled_from(LOSSLESS), label="compression")
    axes = "ZCYX" if kind == "imagej" else data.draw(st.sampled_from(["ZCYX", "CZYX"]), label="axes")
    spacing = data.draw(st.tuples(*[st.floats(0.01, 50.0)] * 3), label="(z, y, x) in micrometres")
    tiled = kind != "imagej" and data.draw(st.booleans(), label="tiled")
    predictor = compression in ("lzw", "zlib", "zstd") and not dtype.startswith("float") and data.draw(st.booleans())
    expected = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 100, shape).astype(dtype)
    z, y, x = spacing
    metadata: dict[str, Any] = {"axes": axes, "spacing": z, "unit": "um"}
    if kind != "imagej":
        metadata = {"axes": axes, "PhysicalSizeZ": z, "PhysicalSizeY": y, "PhysicalSizeX": x}
    path = tmp_path / "a.tif"
    path.unlink(missing_ok=True)
    tifffile.imwrite(
        path,
        expected if axes == "ZCYX" else np.swapaxes(expected, 0, 1),
        ome=kind == "ome",
        imagej=kind == "imagej",
        bigtiff=kind != "imagej" and data.draw(st.booleans(), label="bigtiff"),
        byteorder=data.draw(st.sampled_from("<>"), label="byte order") if kind != "imagej" else None,
        photometric="minisblack",
        planarconfig="separate" if kind == "shaped" and shape[1] > 1 and axes == "ZCYX" else None,
        compression=compression,
        predictor=predictor,
        tile=(16, 32) if tiled else None,
        resolution=(1 / x, 1 / y) if kind == "imagej" else None,
        metadata=metadata,
    )
    volume = read(path)
    assert volume.array.dtype == np.dtype(dtype)
    assert np.array_equal(volume.array, np.moveaxis(expected, 1, 3))
    assert volume.spacing == pytest.approx(spacing, rel=1e-4)
    assert np.array_equal(volume.affine, scaling_affine(volume.spacing))


# Spacing


@pytest.mark.parametrize(
    ("unit", "micrometres"),
    [("nm", 1e-3), ("µm", 1.0), ("μm", 1.0), ("mm", 1e3), ("cm", 1e4), ("m", 1e6), ("Å", 1e-4), ("in", 25400.0)],
)
def test_ome_units_become_micrometres(tmp_path: Path, unit: str, micrometres: float) -> None:
    sizes = {"Z": 3.0, "Y": 2.0, "X": 0.5}
    metadata: dict[str, Any] = {"axes": "ZYX"}
    for axis, size in sizes.items():
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": unit}
    volume = read(written(tmp_path, ZYX, ome=True, metadata=metadata))
    assert volume.spacing == pytest.approx((3.0 * micrometres, 2.0 * micrometres, 0.5 * micrometres))
    assert np.allclose(np.diag(volume.affine)[:3], volume.spacing[::-1])


def test_ome_units_may_differ_by_axis_and_default_to_micrometres(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 0.002, "PhysicalSizeZUnit": "mm", "PhysicalSizeY": 0.25}
    metadata |= {"PhysicalSizeX": 7.0, "PhysicalSizeXUnit": "pixel"}  # a unit of no length
    assert read(written(tmp_path, ZYX, ome=True, metadata=metadata)).spacing == pytest.approx((2.0, 0.25, 1.0))


@pytest.mark.parametrize("stated", [0, -1.0, "INF", "NaN"])
def test_a_size_that_is_no_size_is_as_if_not_stated(tmp_path: Path, stated: object) -> None:
    path = written(tmp_path, ZYX, ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": stated, "PhysicalSizeY": 0.5})
    assert read(path).spacing == (1.0, 0.5, 1.0)


def test_a_size_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, ZYX, ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": "0,5"})
    with pytest.raises(DataError, match=r"PhysicalSizeX .* is not a number"):
        read(path)


@pytest.mark.parametrize(
    ("unit", "micrometres"),
    [("um", 1.0), ("\\u00B5m", 1.0), ("Micron", 1.0), ("nm", 1e-3), ("mm", 1e3), ("cm", 1e4), ("m", 1e6)],
)
def test_imagej_units_become_micrometres(tmp_path: Path, unit: str, micrometres: float) -> None:
    # 4 pixels a unit along x, 2 along y, slices 3 units apart.
    options = {
        "imagej": True,
        "resolution": (4.0, 2.0),
        "metadata": {"axes": "ZYX", "unit": unit, "spacing": 3.0},
    }
    expected = (3.0 * micrometres, 0.5 * micrometres, 0.25 * micrometres)
    assert read(written(tmp_path, ZYX, **options)).spacing == pytest.approx(expected)


def test_imagej_unit_in_latin_1_is_understood(tmp_path: Path) -> None:
    path = written(tmp_path, ZYX, imagej=True, metadata={"axes": "ZYX", "unit": "nm", "spacing": 3.0})
    assert read(path).spacing[0] == pytest.approx(0.003)
    path.write_bytes(path.read_bytes().replace(b"unit=nm", b"unit=\xb5m"))
    assert read(path).spacing[0] == 3.0


def test_imagej_without_a_unit_keeps_the_proportions_but_no_dots_per_inch(tmp_path: Path) -> None:
    stack = {"axes": "ZYX", "spacing": 3.0}
    assert read(written(tmp_path, ZYX, imagej=True, metadata=stack)).spacing == (3.0, 1.0, 1.0)
    options = {"resolution": (72, 72), "resolutionunit": "INCH"}
    assert read(written(tmp_path, ZYX, imagej=True, metadata=stack, **options)).spacing == (3.0, 1.0, 1.0)
    furlongs = {**stack, "unit": "furlong"}
    assert read(written(tmp_path, ZYX, imagej=True, metadata=furlongs)).spacing == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("unit", "micrometres"), [("CENTIMETER", 1e4), ("MILLIMETER", 1e3), ("MICROMETER", 1.0)])
def test_resolution_tags_state_the_pixel_size(tmp_path: Path, unit: str, micrometres: float) -> None:
    path = written(tmp_path, ZYX, resolution=(20000, 40000), resolutionunit=unit, metadata=None)
    assert read(path).spacing == pytest.approx((1.0, micrometres / 40000, micrometres / 20000))


# Colours and numbers


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha", "unspecified"])
def test_alpha_is_dropped_from_rgb_of_8_and_16_bits(tmp_path: Path, alpha: str) -> None:
    for dtype in (np.uint8, np.uint16):
        rgba = voxels(9, 8, 4, dtype=dtype) * dtype(1 if dtype == np.uint8 else 300)
        volume = read(written(tmp_path, rgba, photometric="rgb", extrasamples=[alpha]))
        assert volume.array.dtype == dtype
        assert np.array_equal(volume.array[0], rgba[..., :3])


def test_samples_beside_grey_are_channels_unless_marked_as_alpha(tmp_path: Path) -> None:
    pixels = voxels(9, 8, 4)
    path = written(tmp_path, pixels, planarconfig="contig", extrasamples=["unspecified"] * 3)
    assert np.array_equal(read(path).array[0], pixels)
    path = written(tmp_path, pixels[..., :2], planarconfig="contig", extrasamples=["unassalpha"])
    assert np.array_equal(read(path).array[0], pixels[..., :1])
    assert tiff.read(path, is_label=True).channels == 1


def test_colours_that_are_neither_grey_nor_rgb_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SEPARATED"):
        read(written(tmp_path, voxels(9, 8, 4), photometric="separated"))
    with pytest.raises(DataError, match="CIELAB"):
        read(written(tmp_path, voxels(9, 8, 3), photometric="cielab"))
    with pytest.raises(DataError, match="YCBCR"):  # JPEG alone is turned to RGB
        read(written(tmp_path, voxels(9, 8, 3), photometric="ycbcr", subsampling=(1, 1)))
    palette = np.zeros((3, 256), np.uint16)
    with pytest.raises(DataError, match="palette"):
        read(written(tmp_path, voxels(5, 9, 8), photometric="palette", colormap=palette))


def test_numbers_that_are_no_brightness_are_refused(tmp_path: Path) -> None:
    for is_label in (False, True):
        with pytest.raises(DataError, match="complex64"):
            tiff.read(written(tmp_path, np.zeros((9, 8), np.complex64)), is_label)
    bits = written(tmp_path, np.eye(9, dtype=bool))
    with pytest.raises(DataError, match="bool"):
        read(bits)
    assert np.array_equal(tiff.read(bits, is_label=True).array[0, ..., 0], np.eye(9, dtype=np.uint8))


def test_zero_is_white_of_12_bits_is_inverted_within_its_bits(tmp_path: Path) -> None:
    # Two pixels of 12 bits, 0x000 and 0xABC, in three bytes.
    path = written(tmp_path, np.zeros((1, 2), np.uint8), photometric="miniswhite", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages[0]
        offset = page.dataoffsets[0]
        page.tags["BitsPerSample"].overwrite(12)
        page.tags["StripByteCounts"].overwrite(3)
    content = bytearray(path.read_bytes())
    content[offset : offset + 3] = b"\x00\x0a\xbc"
    path.write_bytes(bytes(content))
    assert read(path).array.ravel().tolist() == [0xFFF, 0xFFF - 0xABC]


def test_jpeg_is_read_as_rgb_near_its_source(tmp_path: Path) -> None:
    ramp = np.linspace(0, 250, 64).astype(np.uint8)
    image = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp, (64, 1)).T, np.full((64, 64), 90, np.uint8)], -1)
    for inside in ("rgb", "ycbcr"):
        options = {"compressionargs": {"outcolorspace": inside}, "tile": (32, 32), "subsampling": (1, 1)}
        path = written(tmp_path, image, photometric="rgb", compression="jpeg", **options)
        with tifffile.TiffFile(path) as file:
            assert file.pages[0].photometric.name == inside.upper()
        assert np.abs(read(path).array[0].astype(int) - image).max() <= 4


def test_label_stack_keeps_its_16_bit_numbers(tmp_path: Path) -> None:
    instances = voxels(5, 11, 7, dtype=np.uint16) * np.uint16(320)
    for options in (
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"compression": "zlib"},
        {"photometric": "miniswhite"},
    ):
        label = tiff.read(written(tmp_path, instances, **options), is_label=True)
        assert label.array.dtype == np.uint16
        assert np.array_equal(label.array[..., 0], instances)


# Pyramids

LEVELS = [voxels(3, 96, 160, dtype=np.uint16)]
LEVELS += [LEVELS[0][:, ::2, ::2], LEVELS[0][:, ::4, ::4]]
TILE = {"tile": (16, 16), "photometric": "minisblack", "compression": "zlib"}


def write_ome_pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as writer:
        metadata = {"axes": "ZYX", "PhysicalSizeZ": 2.0, "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}
        writer.write(LEVELS[0], subifds=2, metadata=metadata, **TILE)
        for level in LEVELS[1:]:
            writer.write(level, subfiletype=1, **TILE)


def write_shaped_pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        metadata = {"axes": "ZYX", "PhysicalSizeZ": 2.0, "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}
        writer.write(LEVELS[0], subifds=2, metadata=metadata, **TILE)
        for level in LEVELS[1:]:
            writer.write(level, subfiletype=1, **TILE)


@pytest.mark.parametrize("write", [write_ome_pyramid, write_shaped_pyramid])
def test_pyramid_of_subifds_is_read_at_the_level_asked_for(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "a.ome.tif")
    for number, level in enumerate(LEVELS):
        volume = read(tmp_path / "a.ome.tif", number)
        assert np.array_equal(volume.array[..., 0], level)
        assert volume.spacing == pytest.approx((2.0, 0.5 * 2**number, 0.25 * 2**number))
        assert np.array_equal(volume.affine, scaling_affine(volume.spacing))


@pytest.mark.parametrize("metadata", [{}, None])
def test_pyramid_of_reduced_pages_is_read_at_the_level_asked_for(
    tmp_path: Path, metadata: dict[str, Any] | None
) -> None:
    image = voxels(97, 161, 3)  # whose half is no whole number
    levels = [image, image[::2, ::2], image[::8, ::8]]  # steps of 2 and of 4
    mask = np.ones((97, 161), bool)
    options = {"tile": (16, 16), "metadata": metadata, "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(levels[0], photometric="rgb", **options)
        writer.write(mask, photometric="mask", subfiletype=4, metadata=metadata)
        for level in levels[1:]:
            writer.write(level, photometric="rgb", subfiletype=1, **options)
    for number, level in enumerate(levels):
        volume = read(tmp_path / "a.tif", number)
        assert np.array_equal(volume.array[0], level)
        assert volume.spacing == pytest.approx((1.0, *[0.5 * (1, 2, 8)[number]] * 2))
    with pytest.raises(DataError, match=r"level 3 .* does not exist: the levels are 0 to 2"):
        read(tmp_path / "a.tif", 3)


def test_slide_is_read_without_its_thumbnail_label_and_macro(tmp_path: Path) -> None:
    image = voxels(128, 256, 3)
    levels = [image, image[::4, ::4]]
    description = "Aperio Image Library v11.2.1\r\n256x128 (16x16) |AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        tiled = {"photometric": "rgb", "tile": (16, 16), "metadata": None}
        striped = {"photometric": "rgb", "metadata": None, "description": "Aperio"}
        writer.write(levels[0], description=description, **tiled)
        writer.write(image[::2, ::2], **striped)  # the thumbnail
        writer.write(levels[1], description=description, **tiled)
        writer.write(voxels(50, 40, 3), subfiletype=1, **striped)  # the label
        writer.write(voxels(30, 90, 3), subfiletype=9, **striped)  # the macro
    for number, level in enumerate(levels):
        volume = read(tmp_path / "a.tif", number)
        assert np.array_equal(volume.array[0], level)
        assert volume.spacing == pytest.approx((1.0, 0.499 * 4**number, 0.499 * 4**number))
    with pytest.raises(DataError, match="level 2"):
        read(tmp_path / "a.tif", 2)


@pytest.mark.parametrize("level", [1, -1])
def test_a_level_that_does_not_exist_is_refused(tmp_path: Path, level: int) -> None:
    with pytest.raises(DataError, match=rf"level {level} .* does not exist: the levels are 0 to 0"):
        read(written(tmp_path, ZYX), level)


def test_reading_a_level_decodes_no_other(tmp_path: Path) -> None:
    write_ome_pyramid(tmp_path / "a.ome.tif")
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        offsets = [offset for page in file.pages for offset in page.aspage().dataoffsets]
        counts = [count for page in file.pages for count in page.aspage().databytecounts]
    content = bytearray((tmp_path / "a.ome.tif").read_bytes())
    for offset, count in zip(offsets, counts, strict=True):
        content[offset : offset + count] = b"\xff" * count  # nothing that zlib takes
    (tmp_path / "a.ome.tif").write_bytes(bytes(content))
    assert np.array_equal(read(tmp_path / "a.ome.tif", 1).array[..., 0], LEVELS[1])
    with pytest.raises(Exception, match=r"."):
        read(tmp_path / "a.ome.tif", 0)


# What is not one image


@pytest.mark.parametrize("options", [{"ome": True}, {"imagej": True}, {}])
def test_points_in_time_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    path = written(tmp_path, ZCYX, metadata={"axes": "TZYX"}, **options)
    with pytest.raises(DataError, match=r"found 5 time points\. Save each"):
        read(path)


def test_axes_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not say which axes its shape \(5, 3, 11, 7\) has"):
        read(written(tmp_path, ZCYX))


def test_several_images_are_refused(tmp_path: Path) -> None:
    for ome in (False, True):
        with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as writer:
            writer.write(voxels(40, 30), photometric="minisblack")
            writer.write(voxels(41, 17), photometric="minisblack")
        with pytest.raises(DataError, match="found 2 images"):
            read(tmp_path / "a.tif")


def test_ome_image_keeps_its_own_size_beside_the_slide_label(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as writer:
        writer.write(voxels(17, 19), metadata={"Name": "label image", "PhysicalSizeX": 99.0})
        writer.write(voxels(40, 30), metadata={"Name": "slide", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    volume = read(tmp_path / "a.tif")
    assert volume.shape == (1, 40, 30)
    assert volume.spacing == (1.0, 0.5, 0.5)


def test_ome_image_over_several_files_is_refused_with_and_without_them(tmp_path: Path) -> None:
    names = ["a.ome.tif", "b.ome.tif"]
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{own}">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="7" SizeY="11" SizeZ="2" '
        'SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
        + "".join(
            f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
            for z, name in enumerate(names)
        )
        + "</Pixels></Image></OME>"
    )
    for name in names:
        tifffile.imwrite(tmp_path / name, ZYX[0], description=xml.format(own=name), metadata=None)
    with pytest.raises(DataError, match="several files"):
        read(tmp_path / "a.ome.tif")
    (tmp_path / "b.ome.tif").unlink()
    with pytest.raises(ValueError, match="never written"):
        read(tmp_path / "a.ome.tif")


def test_ome_metadata_of_another_file_are_refused(tmp_path: Path) -> None:
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<BinaryOnly MetadataFile="a.ome" UUID="urn:uuid:0"/></OME>'
    )
    with pytest.raises(DataError, match="OME metadata do not describe"):
        read(written(tmp_path, ZYX, description=xml, metadata=None))


# What is missing

CUT: dict[str, tuple[Array, dict[str, Any]]] = {
    "pages": (ZYX, {"metadata": None}),
    "compressed pages": (ZYX, {"metadata": None, "compression": "zlib"}),
    "shape": (ZYX, {}),
    "compressed shape": (ZYX, {"compression": "lzw"}),
    "one description": (ZYX, {"metadata": {"axes": "ZYX", "truncated": True}}),
    "OME": (ZCYX, {"ome": True, "metadata": {"axes": "ZCYX"}}),
    "compressed OME": (ZCYX, {"ome": True, "compression": "zstd", "metadata": {"axes": "ZCYX"}}),
    "ImageJ": (ZYX, {"imagej": True, "metadata": {"axes": "ZYX"}}),
    "BigTIFF": (ZYX, {"bigtiff": True, "metadata": None}),
}


@pytest.mark.parametrize("layout", CUT)
def test_stack_cut_short_anywhere_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str) -> None:
    stored, options = CUT[layout]
    path = written(tmp_path, stored, **options)
    complete, whole = read(path), path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 100), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        try:
            volume = read(path)
        except Exception as error:  # of any class; the registry of readers makes a DataError of it
            assert not isinstance(error, AssertionError)
            continue
        # tifffile ends a file with two resolutions, 16 bytes that no tag points to: all else is needed.
        assert length >= len(whole) - 16
        assert np.array_equal(volume.array, complete.array)
        assert volume.spacing == complete.spacing
    assert not caplog.records  # tifffile would print them to stderr


def test_slices_written_one_by_one_and_cut_short_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for metadata in ({}, None):
        with tifffile.TiffWriter(path) as writer:
            for plane in ZYX:
                writer.write(plane, photometric="minisblack", compression="zlib", metadata=metadata)
        whole = path.read_bytes()
        for length in range(len(whole) // 3, len(whole), 17):
            path.write_bytes(whole[:length])
            with pytest.raises(Exception, match=r"."):
                read(path)


def test_description_of_more_slices_than_the_file_has_is_refused(tmp_path: Path) -> None:
    for options in ({}, {"compression": "zlib"}):
        path = written(tmp_path, ZYX, metadata=None, description='{"shape": [9, 11, 7]}', **options)
        with path.open("ab") as stream:
            stream.write(b"\0" * 4096)  # so that the end of the file is not what is found
        with pytest.raises(ValueError, match=r"never written|fewer pages"):
            read(path)


def test_tiles_that_were_never_written_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, voxels(3, 64, 64), tile=(16, 16), metadata=None, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as file:
        offsets, counts = (file.pages[1].tags[name] for name in ("TileOffsets", "TileByteCounts"))
        offsets.overwrite((*offsets.value[:-1], 0))
        counts.overwrite((*counts.value[:-1], 0))
    with pytest.raises(ValueError, match="never written"):
        read(path)


# Real files


@needs("microscopy_3d")
def test_real_stacks_agree_with_tifffile_and_their_labels() -> None:
    images = [path for path in sorted((DATA / "microscopy_3d").glob("*.tif*")) if "_segm" not in path.stem]
    assert images
    for path in images:
        image = read(path)
        label = tiff.read(path.with_name(f"{path.stem}_segm{path.suffix}"), is_label=True)
        assert np.array_equal(image.array[..., 0], tifffile.imread(path))
        assert image.shape == label.shape
        assert image.shape[0] > 1
        assert (image.channels, label.channels) == (1, 1)
        assert image.array.dtype == label.array.dtype == np.uint16
        # These files state 1 micrometre, or nothing.
        assert image.spacing == label.spacing == (1.0, 1.0, 1.0)


@needs("nuclei")
def test_real_slides_agree_with_tifffile() -> None:
    for path in sorted((DATA / "nuclei").glob("*/*/*.tif"))[::40]:
        stored = tifffile.imread(path)
        volume = tiff.read(path, is_label=path.parent.name == "labels")
        assert np.array_equal(volume.array[0], stored if stored.ndim == 3 else stored[..., np.newaxis])
