"""A graph that takes a patch at run time: two inputs per feed-forward matrix, which are there without being asked for.

    y = x @ W + Gather(x @ delta, map, axis=-1)

`delta` [in, vectors] holds the shared vectors of a pack and one column of zeros, `map` [out] which column each neuron adds.
Both are initializers that a caller may override, with one column of zeros as their own content: nothing is added then.
onnxruntime overrides them from an .onnx_adapter file. That works on quantized matrices too, and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from nestpatch.errors import UnsupportedModelError
from nestpatch.export.onnx._graph import TRANSPOSED
from nestpatch.formats.lora.onnx import DELTA, MAP

if TYPE_CHECKING:
    import onnx_ir as ir


def add_inputs(model: ir.Model, weights: Mapping[str, str]) -> None:
    """Adds the two inputs for each of these weights: name on disk, by which inputs are called -> name in transformers.

    Raises UnsupportedModelError when the graph has no product with one of them.
    """
    products = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "MatMulNBits") and node.inputs[1] is not None:
            products[str(node.inputs[1].name).partition(TRANSPOSED)[0]] = node
    for stored, weight in weights.items():
        module = weight.removesuffix(".weight")
        if module not in products:
            raise UnsupportedModelError(
                f"the graph has no product with {weight}, so that no patch could be added to it",
                advice="Export without --adapter-ready and merge patches into the weights.",
            )
        _add(model.graph, products[module], stored.removesuffix(".weight"))


def _add(graph: ir.Graph, node: ir.Node, module: str) -> None:
    import onnx_ir as ir

    given, result = node.inputs[0], node.outputs[0]
    if result.shape is None or result.dtype is None:
        raise UnsupportedModelError(f"the graph does not say what {module} gives")
    rows, width = int(result.shape[-1]), _width(node)  # type: ignore[arg-type]
    delta = _overridable(graph, module + DELTA, np.zeros((width, 1), result.dtype.numpy()), [width, f"{module}.vectors"])
    place = _overridable(graph, module + MAP, np.zeros(rows, np.int32), [rows])
    product = ir.node("MatMul", [given, delta], name=f"{module}.nest/MatMul")
    gather = ir.node("Gather", [product.outputs[0], place], {"axis": -1}, name=f"{module}.nest/Gather")
    add = ir.node("Add", [result, gather.outputs[0]], name=f"{module}.nest/Add")
    for new, part in ((product, "product"), (gather, "change"), (add, "patched")):
        new.outputs[0].name = f"{module}.nest_{part}"
        new.outputs[0].dtype = result.dtype
    gather.outputs[0].shape = add.outputs[0].shape = result.shape
    ir.convenience.replace_all_uses_with(result, add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, result)
    graph.insert_after(node, [product, gather, add])


def _width(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return int(node.attributes["K"].as_int())
    weight = node.inputs[1]
    assert weight is not None  # noqa: S101 - the caller looked
    assert weight.shape is not None  # noqa: S101 - an initializer has one
    return int(weight.shape[0])  # type: ignore[arg-type]


def _overridable(graph: ir.Graph, name: str, content: np.ndarray, shape: list[int | str]) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(content, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
