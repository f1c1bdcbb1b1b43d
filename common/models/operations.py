"""How convolutions are computed: a network says which it wants, its caller how.

The same architecture trains in float32 or in bfloat16, and is exported with 3D convolutions written as 2D ones: each is
another `Operations`. What they compute is the same but for rounding.
"""

from __future__ import annotations

import functools

import tensorflow as tf


class Operations:
    """Convolutions with zero padding as TensorFlow has them, in 2D and 3D as the images are.

    Images are (batch, spatial..., channel). Every method keeps the static shape where it is known.
    """

    def convolve(self, images: tf.Tensor, kernel: tf.Tensor, *, stride: int = 1, dilation: int = 1) -> tf.Tensor:
        """Convolution by a kernel (spatial..., in, out), padded so that stride 1 keeps the size.

        Spatial sizes become ceil(size / stride). `stride` and `dilation` are not both above 1.
        """
        dimensions = dimensions_of(images)
        if dimensions == 3 and dilation > 1:
            return self._convolve_planes(images, kernel, dilation)
        return tf.nn.convolution(
            images,
            kernel,
            strides=[stride] * dimensions,
            dilations=[dilation] * dimensions,
            padding="SAME",
            data_format="NHWC" if dimensions == 2 else "NDHWC",
        )

    def convolve_depthwise(
        self, images: tf.Tensor, kernel: tf.Tensor, *, stride: int = 1, dilation: int = 1
    ) -> tf.Tensor:
        """Convolution of each channel by itself, in 2D, by a kernel (y, x, channel, 1); sizes as for `convolve`."""
        return tf.nn.depthwise_conv2d(
            images, kernel, strides=[1, stride, stride, 1], padding="SAME", dilations=[dilation] * 2
        )

    def convolve_transposed(self, images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Transposed convolution by a kernel (2..., out, in) at stride 2: twice the spatial sizes."""
        dimensions = dimensions_of(images)
        filters = kernel.shape[-2]
        shape = tf.shape(images)
        target = tf.concat([shape[:1], shape[1:-1] * 2, [filters]], axis=0)
        static = [2 * size if size is not None else None for size in images.shape[1:-1]]
        if images.shape[0] is not None and None not in static:
            target = [images.shape[0], *static, filters]
        transpose = tf.nn.conv2d_transpose if dimensions == 2 else tf.nn.conv3d_transpose
        result = transpose(images, kernel, target, strides=[1] + [2] * dimensions + [1], padding="SAME")
        result.set_shape([images.shape[0], *static, filters])
        return result

    def _convolve_planes(self, images: tf.Tensor, kernel: tf.Tensor, dilation: int) -> tf.Tensor:
        """A dilated 3D convolution as the sum of 2D ones over the planes of the kernel.

        TensorFlow has gradients of dilated 3D convolutions for some CPUs only, and LiteRT does not have what it writes
        them as.
        """
        planes = kernel.shape[0]
        before = dilation * ((planes - 1) // 2)
        padded = tf.pad(images, [[0, 0], [before, dilation * (planes - 1) - before], [0, 0], [0, 0], [0, 0]])
        shape = tf.shape(images)
        depth, height, width, channels = (
            shape[axis] if images.shape[axis] is None else images.shape[axis] for axis in range(1, 5)
        )
        summands = []
        for index in range(planes):
            part = padded[:, index * dilation : index * dilation + depth]
            flat = tf.reshape(part, [-1, height, width, channels])
            summands.append(self.convolve(flat, kernel[index], dilation=dilation))
        result = tf.reshape(functools.reduce(tf.add, summands), [-1, depth, height, width, kernel.shape[-1]])
        result.set_shape([*images.shape[:-1], kernel.shape[-1]])
        return result


NATIVE = Operations()


def dimensions_of(images: tf.Tensor) -> int:
    """2 for images (batch, y, x, channel), 3 for (batch, z, y, x, channel)."""
    return int(images.shape.rank) - 2
