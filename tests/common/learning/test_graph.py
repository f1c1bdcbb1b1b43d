"""TFF computations called inside this process."""

from __future__ import annotations

import collections
import threading
import weakref

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from common.learning.graph import Graph, flatten, leaf_types, to_numpy, unflatten


@tff.tensorflow.computation(np.float32, tff.TensorType(np.float32, (3,)))
def _scaled(factor: tf.Tensor, vector: tf.Tensor) -> dict[str, tf.Tensor]:
    return collections.OrderedDict(product=factor * vector, same=vector, again=vector)


def test_a_computation_gives_its_results_in_order_passed_through_arguments_too() -> None:
    product, same, again = to_numpy(Graph(_scaled)(np.float32(2), np.array([1, 2, 3], np.float32)))
    np.testing.assert_array_equal(product, [2, 4, 6])
    np.testing.assert_array_equal(same, [1, 2, 3])
    np.testing.assert_array_equal(again, [1, 2, 3])


def test_a_data_set_is_an_argument_like_any_other() -> None:
    @tff.tensorflow.computation(tff.SequenceType(np.int64), np.int64)
    def total(data: tf.data.Dataset, start: tf.Tensor) -> tf.Tensor:
        return data.reduce(start, lambda left, right: left + right)

    assert int(Graph(total)(tf.data.Dataset.range(5), np.int64(100))[0]) == 110


def test_the_wrong_number_of_leaves_is_refused() -> None:
    with pytest.raises(TypeError, match="expected 2 tensors"):
        Graph(_scaled)(np.float32(2))


_VECTOR = tff.TensorType(np.float32, (2**22,))


def test_a_sum_is_replaced_leaf_by_leaf() -> None:
    """Each sum is made alone, 16 MiB at a time: when the second is made, the first one's predecessor is gone."""

    @tff.tensorflow.computation((_VECTOR, _VECTOR, np.int32), (_VECTOR, _VECTOR, np.int32))
    def add(total: tuple, update: tuple) -> list[tf.Tensor]:
        return [left + right for left, right in zip(total, update, strict=True)]

    graph = Graph(add)
    total = [tf.fill([2**22], value) for value in (1.0, 2.0)] + [tf.constant(3)]
    first = weakref.ref(total[0])
    graph.replace(total, [np.full(2**22, 10, np.float32), np.full(2**22, 20, np.float32), np.int32(30)])
    assert [float(np.ravel(value)[-1]) for value in to_numpy(total)] == [11, 22, 33]
    assert first() is None
    assert [piece.outputs for piece in graph._pieces] == [[0], [1, 2]]


def test_leaves_that_need_each_other_are_replaced_together() -> None:
    @tff.tensorflow.computation((_VECTOR, _VECTOR), np.float32)
    def rotate(pair: tuple, by: tf.Tensor) -> list[tf.Tensor]:
        return [pair[1] + by, pair[0] - by]

    pair = [tf.fill([2**22], value) for value in (1.0, 2.0)]
    Graph(rotate).replace(pair, [np.float32(0.5)])
    assert [float(value[0]) for value in to_numpy(pair)] == [2.5, 0.5]
    with pytest.raises(TypeError, match="expected 2 tensors to replace and 3 in all"):
        Graph(rotate).replace(pair[:1], [np.float32(0.5)])


def test_graphs_with_functions_of_one_name_live_side_by_side() -> None:
    def computation(factor: float) -> tff.Computation:
        @tff.tensorflow.computation(tff.SequenceType(np.float32))
        @tf.function
        def summed(data: tf.data.Dataset) -> tf.Tensor:
            total = tf.constant(0.0)
            for value in data:
                total += factor * value
            return total

        return summed

    data = tf.data.Dataset.from_tensor_slices(np.ones(4, np.float32))
    one, two = Graph(computation(1.0)), Graph(computation(2.0))
    assert (float(one(data)[0]), float(two(data)[0]), float(one(data)[0])) == (4.0, 8.0, 4.0)


def test_threads_that_call_one_graph_at_once_get_the_bits_it_gives_alone() -> None:
    @tff.tensorflow.computation(tff.TensorType(np.float32, (64, 64)))
    def work(matrix: tf.Tensor) -> tf.Tensor:
        for _ in range(10):
            matrix = tf.tanh(matrix @ matrix)
        return matrix

    graph = Graph(work)
    inputs = [np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32) for seed in range(5)]
    alone = [to_numpy(graph(value))[0].copy() for value in inputs]
    together: dict[int, np.ndarray] = {}

    def call(index: int) -> None:
        together[index] = to_numpy(graph(inputs[index]))[0].copy()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        np.testing.assert_array_equal(together[index], expected)


def test_memory_that_numpy_lends_is_not_copied_and_odd_memory_is_still_right() -> None:
    @tff.tensorflow.computation(tff.TensorType(np.float32, (2**18,)))
    def doubled(vector: tf.Tensor) -> tf.Tensor:
        return vector * 2.0

    raw = np.zeros(2**20 + 128, np.uint8)
    start = -raw.ctypes.data % 64
    aligned = raw[start : start + 2**20].view(np.float32)
    unaligned = raw[start + 4 : start + 4 + 2**20].view(np.float32)
    aligned[:] = 1
    for vector in (aligned, unaligned, np.ones(2**19, np.float32)[::2]):
        expected = vector * 2
        np.testing.assert_array_equal(to_numpy(Graph(doubled)(vector))[0], expected)

    @tff.tensorflow.computation(tff.TensorType(np.float32, (2**18,)))
    def same(vector: tf.Tensor) -> tf.Tensor:
        return tf.identity(vector)

    (view,) = to_numpy(Graph(same)(aligned))
    aligned[0] = 7
    assert view[0] == 7  # one memory: what numpy lent, TensorFlow passed on and `to_numpy` shows


def test_structures_flatten_in_the_order_of_their_type_and_come_back() -> None:
    kind = tff.to_type(collections.OrderedDict(b=np.float32, a=(np.int32, np.int32)))
    value = collections.OrderedDict(b=1.0, a=(2, 3))
    assert flatten(value, kind) == [1.0, 2, 3]
    assert unflatten([1.0, 2, 3], kind) == value
    assert len(leaf_types(tff.FederatedType(kind, tff.SERVER))) == 3
    with pytest.raises(TypeError):
        flatten((1.0,), kind)
