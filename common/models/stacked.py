"""3D convolutions written as 2D ones, for export: LiteRT neither quantizes nor accelerates the 3D operations.

A convolution over (z, y, x) sees, at each z, a few whole slices. Laid side by side as channels they are the input of
one 2D convolution, whose kernel is the 3D one with its z axis moved into the input channels; z itself becomes the
batch. The sums are the same, in another order.
"""

from __future__ import annotations

import tensorflow as tf

from common.models.operations import Operations, dimensions_of

_VOXELWISE = frozenset(
    {
        *("Identity", "BiasAdd", "Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum"),
        *("Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "Softplus", "Square", "Sqrt", "Rsqrt"),
    }
)
"""TensorFlow's operations on each voxel alone, with operands of one number a channel or of the same axes."""


class StackedOperations(Operations):
    """3D images (1, z, y, x, channel) of known size, computed with 2D operations alone; 2D images as ever.

    Between two convolutions a volume is a batch of slices (z, y, x, channel), as long as what lies between them looks
    at each voxel alone: in a traced graph such operations are done anew on the slices, next to the convolution, where
    LiteRT's converter makes biases, activations and folded normalization part of it.

    Raises
    ------
    ValueError : the batch is not 1 or a size is unknown.
    """

    def convolve(self, images: tf.Tensor, kernel: tf.Tensor, *, stride: int = 1, dilation: int = 1) -> tf.Tensor:
        """As `Operations.convolve`."""
        if dimensions_of(images) == 2:
            return super().convolve(images, kernel, stride=stride, dilation=dilation)
        taps = _taps(_slices(images), kernel.shape[0], stride, dilation)
        seen = tf.concat([tap for _, tap in taps], axis=-1) if len(taps) > 1 else taps[0][1]
        flat_kernel = tf.concat([kernel[index] for index, _ in taps], axis=2)
        return _volume(tf.nn.conv2d(seen, flat_kernel, stride, "SAME", dilations=dilation))

    def convolve_transposed(self, images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """As `Operations.convolve_transposed`: one 2D operation for the even slices of the result, one for the odd."""
        if dimensions_of(images) == 2:
            return super().convolve_transposed(images, kernel)
        slices = _slices(images)
        z, y, x, _ = slices.shape
        filters = kernel.shape[-2]
        shape = [z, 2 * y, 2 * x, filters]
        halves = [tf.nn.conv2d_transpose(slices, kernel[index], shape, 2, "SAME") for index in range(2)]
        # Row by row, an even slice and the odd one after it are one slice of twice the height.
        return _volume(tf.reshape(tf.concat(halves, axis=1), [2 * z, *shape[1:]]))

    def settled(self, images: tf.Tensor) -> tf.Tensor:
        """The same images, with all that was done to them since the last convolution done next to it.

        For the output of a traced network, which no further convolution takes in.
        """
        return images if dimensions_of(images) == 2 else _volume(_slices(images))


def _taps(slices: tf.Tensor, size: int, stride: int, dilation: int) -> list[tuple[int, tf.Tensor]]:
    """For each place along a kernel's z axis: its index, and the slice that it meets for every slice of the result.

    `size` is the kernel's; padded with zeros as TensorFlow's "SAME" does. Places that meet nothing but padding are
    left out. The tensors are (z / stride, y, x, channel).
    """
    z, y, x, channels = slices.shape
    count = -(-z // stride)
    before = max((count - 1) * stride + (size - 1) * dilation + 1 - z, 0) // 2
    # Where in the images each place begins; it goes on in steps of the stride.
    starts = [(index, index * dilation - before) for index in range(size)]
    starts = [(index, start) for index, start in starts if start < z and start + (count - 1) * stride >= 0]
    above = max(0, -min(start for _, start in starts))
    # A whole number of strides, so that the slices of equal remainder can be cut out without a stride, which XNNPACK
    # does not have: it would hand the volume back and forth.
    length = max((above + start) // stride + count for _, start in starts) * stride
    below = max(length - above - z, 0)
    padded = tf.pad(slices, [[above, below], [0, 0], [0, 0], [0, 0]]) if above or below else slices
    if stride == 1:
        return [(i, slices if start == 0 else padded[above + start : above + start + z]) for i, start in starts]
    rows = tf.reshape(padded[:length], [length // stride, stride * y, x, channels])
    taps = []
    for index, start in starts:
        first, remainder = divmod(above + start, stride)
        taps.append((index, rows[first : first + count, remainder * y : (remainder + 1) * y]))
    return taps


def _slices(images: tf.Tensor) -> tf.Tensor:
    """(1, z, y, x, channel) -> (z, y, x, channel), without a reshape where the volume was made of slices."""
    if images.shape[0] != 1 or None in images.shape:
        raise ValueError(f"images: expected one volume of known size, found shape {tuple(images.shape)}")
    if tf.is_symbolic_tensor(images):
        maker = images.op
        if maker.type == "Reshape" and maker.inputs[0].shape == images.shape[1:]:
            return maker.inputs[0]
        if maker.type == "ConcatV2" and tf.get_static_value(maker.inputs[-1]) in (-1, 4):
            return tf.concat([_slices(part) for part in maker.inputs[:-1]], axis=-1)
        ranks = [tensor.shape.rank for tensor in maker.inputs]
        if maker.type in _VOXELWISE and set(ranks) <= {0, 1, 5}:
            operands = [
                _slices(tensor) if rank == 5 else tensor for tensor, rank in zip(maker.inputs, ranks, strict=True)
            ]
            return _done(maker, operands, ranks.index(5) if ranks.count(5) == 1 else None)
    return tf.reshape(images, images.shape[1:])


def _done(operation: tf.Operation, operands: list[tf.Tensor], moved: int | None) -> tf.Tensor:
    """The operation on other operands. `moved`: the only operand with spatial axes, whose makers may come after it."""
    if moved is not None:
        maker = operands[moved].op

        def done_first(tensor: tf.Tensor) -> tf.Tensor:
            return _done(operation, [*operands[:moved], tensor, *operands[moved + 1 :]], moved)

        # What only puts voxels elsewhere comes after what looks at each alone.
        before = maker.inputs[0] if maker.inputs else operands[moved]
        if maker.type == "Reshape" and before.shape.rank > 1 and before.shape[-1] == operands[moved].shape[-1]:
            return tf.reshape(done_first(before), operands[moved].shape)
        if maker.type == "ConcatV2" and (axis := tf.get_static_value(maker.inputs[-1])) in (0, 1, 2):
            return tf.concat([done_first(part) for part in maker.inputs[:-1]], axis)
    attributes = dict(operation.node_def.attr)
    return operation.graph.create_op(operation.type, operands, [operation.outputs[0].dtype], attrs=attributes).outputs[
        0
    ]


def _volume(slices: tf.Tensor) -> tf.Tensor:
    """(z, y, x, channel) -> (1, z, y, x, channel)."""
    return tf.reshape(slices, [1, *slices.shape])
