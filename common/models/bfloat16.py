"""Convolutions in bfloat16, for training on CPUs that compute it faster than float32.

bfloat16 has the range of float32 and 8 bits of its precision. Images and kernels are rounded to it before a
convolution, sums are kept in float32 by the CPU's instructions, and the result is float32 again: weights, gradients,
normalization and the optimizer never lose precision (Micikevicius et al. 2018, arXiv:1710.03740; Kalamkar et al. 2019,
arXiv:1905.12322). The casts are explicit because TFF's graphs do not take Keras' mixed precision.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import tensorflow as tf

from common.models.operations import Operations, dimensions_of

_CPU_INFO = Path("/proc/cpuinfo")
# The kernel's gradient of some 3D convolutions of smaller images is what lies in memory (TensorFlow 2.14, oneDNN).
_LEAST_SIZE = 3


class Bfloat16Operations(Operations):
    """`Operations` in bfloat16, from float32 to float32. Gradients are computed in bfloat16 and cast likewise.

    Depthwise convolutions stay in float32: they wait for memory, not for multiplications.
    """

    def convolve(self, images: tf.Tensor, kernel: tf.Tensor, *, stride: int = 1, dilation: int = 1) -> tf.Tensor:
        """As `Operations.convolve`."""
        if dimensions_of(images) == 3 and not _is_safe(images):
            return super().convolve(images, kernel, stride=stride, dilation=dilation)
        result = super().convolve(_rounded(images), _rounded(kernel), stride=stride, dilation=dilation)
        return tf.cast(result, tf.float32)

    def convolve_transposed(self, images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """As `Operations.convolve_transposed`."""
        return tf.cast(super().convolve_transposed(_rounded(images), _rounded(kernel)), tf.float32)


BFLOAT16 = Bfloat16Operations()


def fast_bfloat16() -> bool:
    """Whether this CPU trains faster with `BFLOAT16`: whether it multiplies matrices of bfloat16 (AMX)."""
    return has_fast_bfloat16(_CPU_INFO)


@functools.cache
def has_fast_bfloat16(cpu_info: Path) -> bool:
    """`fast_bfloat16` of the CPU that a file in the format of Linux' /proc/cpuinfo describes; False without one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return "amx_bf16" in flags and "amx_tile" in flags


def _is_safe(images: tf.Tensor) -> bool:
    return all(size is not None and size >= _LEAST_SIZE for size in images.shape[1:-1])


def _rounded(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(values, tf.bfloat16)
