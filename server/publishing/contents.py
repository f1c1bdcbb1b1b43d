"""What a `.tflite` file really holds, read from the file: which operations compute in what, and how weights are kept.

The converter's options only ask. An operation without a kernel of the wanted type stays in floating point, and a
weight that nothing quantizes stays as it is, both without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_CONVERSIONS_OF_FORMAT = frozenset({"QUANTIZE", "DEQUANTIZE"})
_CONVOLUTIONS = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "CONV_3D_TRANSPOSE", "FULLY_CONNECTED"}
)
_SCALINGS = frozenset({"ADD", "SUB", "MUL", "DIV"})
_KERNEL_INPUT = 1
_BYTES_OF_A_WEIGHT = {"FLOAT32": 4.0, "FLOAT16": 2.0, "INT16": 2.0, "INT8": 1.0, "UINT8": 1.0, "INT4": 0.5}


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes
    ----------
    operations : all but those that only change the format, QUANTIZE and DEQUANTIZE.
    float_operations : those of them that compute in floating point, by name.
    volumetric : 3D operations, which LiteRT neither quantizes nor accelerates, by name.
    weight_bytes : bytes of constants by type; indices and int8's integer biases are not counted.
    unfolded : what normalization left behind, by name: constants that scale or shift the output of a convolution
        instead of being part of it, and convolutions whose kernel is computed anew for every image.
    """

    operations: int
    float_operations: Mapping[str, int]
    volumetric: Mapping[str, int]
    weight_bytes: Mapping[str, int]
    unfolded: Mapping[str, int]

    @property
    def narrow_share(self) -> float:
        """The share of the weights (by number) that is kept in 16 bits or fewer."""
        numbers = {kind: size / _BYTES_OF_A_WEIGHT[kind] for kind, size in self.weight_bytes.items()}
        return 1 - numbers.get("FLOAT32", 0.0) / sum(numbers.values()) if numbers else 0.0


@dataclass(frozen=True)
class _Operation:
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def contents_of(model: bytes) -> Contents:
    """Read a `.tflite` file."""
    from ai_edge_litert import schema_py_generated as schema

    types = _names(schema.TensorType)
    parsed = schema.Model.GetRootAs(model, 0)
    floats: Counter[str] = Counter()
    volumetric: Counter[str] = Counter()
    weight_bytes: Counter[str] = Counter()
    unfolded: Counter[str] = Counter()
    total = 0
    for graph in (parsed.Subgraphs(index) for index in range(parsed.SubgraphsLength())):
        tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
        kinds = [types[tensor.Type()] for tensor in tensors]
        sizes = [parsed.Buffers(tensor.Buffer()).DataLength() for tensor in tensors]
        operations = list(_operations(parsed, graph, _names(schema.BuiltinOperator)))
        maker = {output: operation for operation in operations for output in operation.outputs}
        constants = {index for index, size in enumerate(sizes) if size}
        for index in constants:
            if kinds[index] in _BYTES_OF_A_WEIGHT:
                weight_bytes[kinds[index]] += sizes[index]
        # A constant kept in fewer bits may be widened when the model is loaded.
        constants |= {
            operation.outputs[0]
            for operation in operations
            if operation.name == "DEQUANTIZE" and operation.inputs[0] in constants
        }
        for operation in operations:
            if operation.name in _CONVERSIONS_OF_FORMAT:
                continue
            total += 1
            floats[operation.name] += any(kinds[output].startswith("FLOAT") for output in operation.outputs)
            volumetric[operation.name] += "3D" in operation.name
            unfolded[operation.name] += _is_unfolded(operation, constants, maker)
    return Contents(total, dict(+floats), dict(+volumetric), dict(weight_bytes), dict(+unfolded))


def _is_unfolded(operation: _Operation, constants: set[int], maker: Mapping[int, _Operation]) -> bool:
    if operation.name in _CONVOLUTIONS:
        return operation.inputs[_KERNEL_INPUT] not in constants
    if operation.name not in _SCALINGS or not constants & set(operation.inputs):
        return False
    (source,) = set(operation.inputs) - constants or {-1}
    while source in maker and maker[source].name == "RESHAPE":
        source = maker[source].inputs[0]
    return source in maker and maker[source].name in _CONVOLUTIONS


def _operations(parsed: Any, graph: Any, names: Mapping[int, str]) -> Iterator[_Operation]:
    for operator in (graph.Operators(index) for index in range(graph.OperatorsLength())):
        code = parsed.OperatorCodes(operator.OpcodeIndex())
        yield _Operation(
            # Codes above 127 are in the newer field only.
            names.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "CUSTOM"),
            tuple(operator.Inputs(index) for index in range(operator.InputsLength())),
            tuple(operator.Outputs(index) for index in range(operator.OutputsLength())),
        )


def _names(enumeration: Any) -> dict[int, str]:
    return {code: name for name, code in vars(enumeration).items() if isinstance(code, int)}
