"""One TFF computation as a TensorFlow callable inside this process.

TFF's own runtimes start a worker process and serialize every argument; for a model of 31M weights that costs seconds a
call. A computation that TFF has compiled to TensorFlow is a GraphDef with the names of its inputs and outputs, so it is
imported here and called directly. The results are the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


class Graph:
    """A TFF computation of tensors (and data sets) as a function of flat lists.

    Parameters
    ----------
    computation : a `tff.Computation` that is a single piece of TensorFlow, as the parts of a `MapReduceForm` are.

    Attributes
    ----------
    parameter, result : the types, `tff.Type` (None for no parameter). Arguments and results are their leaves in order;
        a leaf of sequence type is a `tf.data.Dataset`.

    Graphs with no variables (all of Wardround's) may be called from several threads at once.
    """

    def __init__(self, computation: tff.Computation) -> None:
        self.parameter: tff.Type | None = computation.type_signature.parameter
        self.result: tff.Type = computation.type_signature.result
        self._computation: tff.Computation | None = computation
        self._lock = threading.Lock()
        self._imported: _Imported | None = None
        self._whole: _Piece | None = None
        self._pieces: list[_Piece] = []

    def __call__(self, *arguments: Any) -> list[Any]:
        """Call with the leaves of the parameter; returns the leaves of the result as tensors.

        Raises
        ------
        TypeError : the number of leaves is not the parameter's.
        """
        imported = self._import()
        if len(arguments) != len(imported.inputs):
            raise TypeError(f"expected {len(imported.inputs)} tensors of type {self.parameter}, found {len(arguments)}")
        with self._lock:
            if self._whole is None:
                self._whole = imported.piece(range(len(imported.inputs)), range(len(imported.outputs)))
        return self._whole(arguments)

    def replace(self, state: list[Any], arguments: Sequence[Any]) -> None:
        """Call with the leaves of `state`, then `arguments`; the result's leaves take the places of those of `state`.

        Where each leaf of the result needs no leaf of `state` but its predecessor, as in sums, a few are computed at a
        time and their predecessors let go at once, and `arguments` are asked for those that they need: memory holds
        `state` once, and as little of `arguments` as these hold themselves.

        Raises
        ------
        TypeError : the number of leaves is not the parameter's, or the result has not as many leaves as `state`.
        """
        imported = self._import()
        if len(state) != len(imported.outputs) or len(state) + len(arguments) != len(imported.inputs):
            raise TypeError(
                f"expected {len(imported.outputs)} tensors to replace and {len(imported.inputs)} in all, of type "
                f"{self.parameter}, found {len(state)} and {len(state) + len(arguments)}"
            )
        with self._lock:
            if not self._pieces:
                self._pieces = imported.pieces(leaf_types(self.result))
        for piece in self._pieces:
            values = [state[i] if i < len(state) else arguments[i - len(state)] for i in piece.inputs]
            for index, value in zip(piece.outputs, piece(values), strict=True):
                state[index] = value
            del values

    def _import(self) -> _Imported:
        with self._lock:
            if self._imported is None:
                self._imported = _Imported.of(self._computation)
                self._computation = None  # its graph is held by the function from here on
            return self._imported


@dataclass(frozen=True)
class _Imported:
    """A computation's graph in this process, and the names of its tensors in and out, by position."""

    function: Any
    inputs: list[str]
    outputs: list[str]

    @staticmethod
    def of(computation: tff.Computation) -> _Imported:
        proto = tff.framework.serialize_computation(computation).tensorflow
        graph_def = tf.compat.v1.GraphDef()
        proto.graph_def.Unpack(graph_def)
        inputs = _tensor_names(proto.parameter) if proto.HasField("parameter") else []
        outputs = _tensor_names(proto.result)
        initialize = proto.initialize_op
        del proto
        _make_function_names_unique(graph_def)
        function = tf.compat.v1.wrap_function(partial(tf.graph_util.import_graph_def, graph_def, name=""), [])
        if initialize:
            function.prune([], function.graph.get_operation_by_name(initialize))()
        return _Imported(function, inputs, outputs)

    def piece(self, inputs: Sequence[int], outputs: Sequence[int]) -> _Piece:
        """The part of the graph that computes some of its results, from those arguments that they need."""
        sources = [self.inputs[index] for index in inputs]
        results = [self.outputs[index] for index in outputs]
        # A result that is an argument passed through needs no computation, and `prune` refuses the same tensor twice.
        distinct = [name for name in dict.fromkeys(results) if name not in sources]
        graph = self.function.graph
        function = self.function.prune(
            [graph.get_tensor_by_name(name) for name in sources], [graph.get_tensor_by_name(name) for name in distinct]
        )
        found = [
            (True, distinct.index(name)) if name not in sources else (False, sources.index(name)) for name in results
        ]
        return _Piece(function, list(inputs), list(outputs), found)

    def pieces(self, leaves: Sequence[tff.Type]) -> list[_Piece]:
        """The graph in pieces of about `_PIECE_BYTES` of results where its results take the places of its first inputs.

        One piece where a result needs another's predecessor.
        """
        needed = [self._needed(name) for name in self.outputs]
        separable = all(not needs - {index} & set(range(len(needed))) for index, needs in enumerate(needed))
        groups: list[list[int]] = [[]]
        size = 0
        for index, leaf in enumerate(leaves):
            size += int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
            if separable and groups[-1] and size > _PIECE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(index)
        return [self.piece(sorted(set().union(*(needed[i] for i in group))), group) for group in groups]

    def _needed(self, output: str) -> set[int]:
        """The positions of the arguments that a result is computed from."""
        graph = self.function.graph
        positions = {graph.get_tensor_by_name(name).op.name: index for index, name in enumerate(self.inputs)}
        waiting, seen = [graph.get_tensor_by_name(output).op], set()
        while waiting:
            operation = waiting.pop()
            if operation.name not in seen:
                seen.add(operation.name)
                waiting += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
        return {positions[name] for name in seen if name in positions}


@dataclass(frozen=True)
class _Piece:
    """Some results of a graph as a function of the arguments that they need.

    Attributes
    ----------
    inputs, outputs : positions, in the whole graph's, of the arguments it takes and of the results it gives.
    found : where each result is: (True, position among what the function returns) or (False, position in `inputs`).
    """

    function: Any
    inputs: list[int]
    outputs: list[int]
    found: list[tuple[bool, int]]

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        values = [_to_tensor(argument) for argument in arguments]
        # Called by position: calling the function itself formats every argument for an error that never comes.
        produced = self.function._call_flat(values, self.function.captured_inputs)
        return [produced[index] if kept else values[index] for kept, index in self.found]


_SHARED_BYTES = 2**20
_ALIGNMENT = 64
_PIECE_BYTES = 2**24


def _to_tensor(value: Any) -> tf.Tensor:
    if isinstance(value, tf.data.Dataset):
        return tf.data.experimental.to_variant(value)
    if isinstance(value, np.ndarray) and value.nbytes >= _SHARED_BYTES and _can_be_shared(value):
        # Without a copy, which `convert_to_tensor` always makes; the tensor keeps the array alive.
        return tf.experimental.dlpack.from_dlpack(value.__dlpack__())
    return tf.convert_to_tensor(value)


def _can_be_shared(value: np.ndarray[Any, Any]) -> bool:
    """NumPy lends only writable memory; TensorFlow takes what its vector units can read and aborts on the rest."""
    return value.flags.writeable and value.flags.c_contiguous and value.ctypes.data % _ALIGNMENT == 0


def _tensor_names(binding: Any) -> list[str]:
    kind = binding.WhichOneof("binding")
    if kind == "tensor":
        return [binding.tensor.tensor_name]
    if kind == "sequence":
        return [binding.sequence.variant_tensor_name]
    return [name for element in binding.struct.element for name in _tensor_names(element)]


_imported_graphs = 0
_imported_graphs_lock = threading.Lock()


def _make_function_names_unique(graph_def: tf.compat.v1.GraphDef) -> None:
    """Renames the graph's library functions: graphs imported side by side share one namespace of functions."""
    global _imported_graphs
    with _imported_graphs_lock:
        _imported_graphs += 1
        suffix = f"_g{_imported_graphs}"
    names = {function.signature.name for function in graph_def.library.function}

    def rename(attributes: Any) -> None:
        for attribute in attributes.values():
            if attribute.HasField("func") and attribute.func.name in names:
                attribute.func.name += suffix
            for function in attribute.list.func:
                if function.name in names:
                    function.name += suffix

    for function in graph_def.library.function:
        function.signature.name += suffix
        rename(function.attr)
        for node in function.node_def:
            if node.op in names:
                node.op += suffix
            rename(node.attr)
    for node in graph_def.node:
        if node.op in names:
            node.op += suffix
        rename(node.attr)
    for gradient in graph_def.library.gradient:
        gradient.function_name += suffix
        gradient.gradient_func += suffix


def leaf_types(type_signature: tff.Type | None) -> list[tff.Type]:
    """The leaves (tensor and sequence types) of a type, in order; placements are looked through."""
    if type_signature is None:
        return []
    if isinstance(type_signature, tff.FederatedType):
        return leaf_types(type_signature.member)
    if isinstance(type_signature, tff.StructType):
        return [leaf for element in type_signature for leaf in leaf_types(element)]
    return [type_signature]


def flatten(value: Any, type_signature: tff.Type) -> list[Any]:
    """The leaves of a Python structure of the given type, in the type's order.

    Raises
    ------
    TypeError : the structure is not of that type.
    """
    if isinstance(type_signature, tff.FederatedType):
        return flatten(value, type_signature.member)
    if not isinstance(type_signature, tff.StructType):
        return [value]
    elements = list(tff.structure.from_container(value))
    if len(elements) != len(type_signature):
        raise TypeError(f"expected {type_signature}, found {len(elements)} elements")
    return [leaf for element, kind in zip(elements, type_signature, strict=True) for leaf in flatten(element, kind)]


def unflatten(leaves: Sequence[Any], type_signature: tff.Type) -> Any:
    """The Python structure (containers as TFF would return them) of the given type with these leaves."""
    iterator = iter(leaves)

    def build(kind: tff.Type) -> Any:
        if isinstance(kind, tff.FederatedType):
            return build(kind.member)
        if isinstance(kind, tff.StructType):
            return tff.structure.Struct([(name, build(element)) for name, element in tff.structure.iter_elements(kind)])
        return next(iterator)

    return tff.types.type_to_py_container(build(type_signature), type_signature)


def to_numpy(values: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Tensors as read-only arrays over the same memory; other values as arrays."""
    return [np.asarray(memoryview(value)) if tf.is_tensor(value) else np.asarray(value) for value in values]
