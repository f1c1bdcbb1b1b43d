"""Instance labels as one array that trains a distance head: where objects are, and how deep inside one a voxel lies.

A voxel of an object holds 1 + round(253 * d), where d is its distance to the object's border over the largest such
distance in that object: 1 deep inside, whatever the object's size, and small along borders, also where two objects
touch. So a network learns a valley between them, along which they are told apart (`common.inference.instances`). 0 is
background and 255 stays free for voxels that are ignored, so the array travels like class indices: nearest neighbour
when it is resampled or turned, and 1 to 254 are the one foreground class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

DEEPEST: Final = 254
"""The value of an object's innermost voxels; with 1 for its outermost ones it spans the foreground."""


def encode_distance(instances: npt.NDArray[Any], spacing: Sequence[float] | None = None) -> npt.NDArray[np.uint8]:
    """Encode the objects of a label image.

    Distances are Euclidean, from a voxel's centre to the nearest centre outside its object, be it background or another
    object. The image's own border is not an object's: an object that it cuts has its deepest voxels at the cut, as it
    has in a patch. An object that fills the whole image is deepest everywhere.

    Parameters
    ----------
    instances : integers, shape (y, x) or (z, y, x)
        One number above 0 an object, whose voxels need not hang together; all else is background.
    spacing : distances between voxels along the axes of `instances`, in any unit; None: the same along all.

    Returns
    -------
    uint8 array of the same shape: 0 for background, 1 to 254 inside objects.
    """
    numbers = np.maximum(instances, 0)
    if int(numbers.max()) > numbers.size:  # one box a number follows, so numbers must not be sparse
        numbers = np.unique(numbers, return_inverse=True)[1].reshape(numbers.shape) + int(numbers.min() > 0)
    numbers = numbers.astype(np.int32, copy=False)
    encoded = np.zeros(numbers.shape, np.uint8)
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        if box is None:
            continue
        # A voxel more on each side, where there is one, is the object's surroundings.
        grown = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        inside = numbers[grown] == number
        if inside.all():
            encoded[grown] = DEEPEST
            continue
        depth = ndimage.distance_transform_edt(inside, sampling=spacing)[inside]
        encoded[grown][inside] = 1 + np.rint((DEEPEST - 1) * (depth / depth.max())).astype(np.uint8)
    return encoded


def decode_distance(encoded: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """The foreground, and the normalized distance (float32, 0 to 1, 0 outside), of an encoded array.

    Voxels that are ignored (255) are in neither.
    """
    foreground = (encoded >= 1) & (encoded <= DEEPEST)
    distance = np.where(foreground, (encoded.astype(np.float32) - 1) / (DEEPEST - 1), np.float32(0))
    return foreground, distance.astype(np.float32, copy=False)
