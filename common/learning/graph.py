"""One TFF computation as a TensorFlow callable inside this process.

TFF's own runtimes start a worker process and serialize every argument; for a model of 31M weights that costs seconds a
call. A computation that TFF has compiled to TensorFlow is a GraphDef with the names of its inputs and outputs, so it is
imported here and called directly. The results are the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
        self._function: Any = None

    def __call__(self, *arguments: Any) -> list[Any]:
        """Call with the leaves of the parameter; returns the leaves of the result as tensors.

        Raises
        ------
        TypeError : the number of leaves is not the parameter's.
        """
        with self._lock:
            if self._function is None:
                self._import()
        if len(arguments) != self._inputs:
            raise TypeError(f"expected {self._inputs} tensors of type {self.parameter}, found {len(arguments)}")
        values = [_to_tensor(value) for value in arguments]
        # Called by position: calling the function itself formats every argument for an error that never comes.
        produced = self._function._call_flat(values, self._function.captured_inputs)
        return [produced[index] if kept else values[index] for kept, index in self._outputs]

    def _import(self) -> None:
        proto = tff.framework.serialize_computation(self._computation).tensorflow
        self._computation = None  # Its graph is held by the function from here on.
        graph_def = tf.compat.v1.GraphDef()
        proto.graph_def.Unpack(graph_def)
        inputs = _tensor_names(proto.parameter) if proto.HasField("parameter") else []
        outputs = _tensor_names(proto.result)
        initialize = proto.initialize_op
        del proto
        _make_function_names_unique(graph_def)
        imported = tf.compat.v1.wrap_function(partial(tf.graph_util.import_graph_def, graph_def, name=""), [])
        del graph_def
        graph = imported.graph
        if initialize:
            imported.prune([], graph.get_operation_by_name(initialize))()
        # A result that is an argument passed through needs no computation, and `prune` refuses the same tensor twice.
        distinct = [name for name in dict.fromkeys(outputs) if name not in inputs]
        self._outputs = [
            (True, distinct.index(name)) if name not in inputs else (False, inputs.index(name)) for name in outputs
        ]
        self._inputs = len(inputs)
        self._function = imported.prune(
            [graph.get_tensor_by_name(name) for name in inputs], [graph.get_tensor_by_name(name) for name in distinct]
        )


_SHARED_BYTES = 2**20
_ALIGNMENT = 64


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
