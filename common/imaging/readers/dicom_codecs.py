"""JPEG decoding for pydicom by imagecodecs: lossless and 12-bit JPEG, for which pydicom knows no other free decoder.

pydicom calls the functions here by name once `register` has run. Source: DICOM PS3.5, A.4.1 and A.4.2.
"""

from __future__ import annotations

from functools import cache

import imagecodecs
import numpy as np
from pydicom.pixels.decoders.base import (
    DecodeRunner,
    JPEGExtended12BitDecoder,
    JPEGLosslessDecoder,
    JPEGLosslessSV1Decoder,
)
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

DECODER_DEPENDENCIES = dict.fromkeys((JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), ("imagecodecs",))
_END_OF_IMAGE = b"\xff\xd9"


@cache
def register() -> None:
    """Make the decoders known to pydicom, once."""
    for decoder in (JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder):
        decoder.add_plugin("imagecodecs", (__name__, "decode_frame"))


def is_available(uid: str) -> bool:
    """Whether a transfer syntax is decoded: pydicom asks."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(content: bytes, runner: DecodeRunner) -> bytes:
    """One JPEG frame as little-endian samples of the file's BitsAllocated; pydicom calls it."""
    # The decoder of lossy frames fills what is missing with grey.
    if not content.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise ValueError("a frame ends before its last pixel")
    is_lossless = runner.transfer_syntax != JPEGExtended12Bit
    frame = np.asarray((imagecodecs.jpegsof3_decode if is_lossless else imagecodecs.jpeg8_decode)(content))
    if frame.dtype.itemsize * 8 > runner.bits_allocated:
        raise ValueError(f"a frame has {frame.dtype.itemsize * 8} bits a sample, the header {runner.bits_allocated}")
    if runner.samples_per_pixel > 1:
        runner.set_option("planar_configuration", 0)
    return frame.astype(f"<u{runner.bits_allocated // 8}").tobytes()
