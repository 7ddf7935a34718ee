"""A graph that accepts a pack at run time: three more inputs for each feed-forward matrix, which a caller may leave out.

    y = x @ W + Gather(x @ delta @ factors, map, axis=-1)

`delta` [in, vectors] contains the vectors of a pack. A column of `factors` [vectors, columns] is what the neurons of a cluster,
or one neuron of a change of low rank, add of them. `map` [out] is the column of each neuron; the last column is zeros, for
neurons that do not change. All three are initializers that a caller may override, by default zeros, so that nothing is added.
onnxruntime overrides them from an .onnx_adapter file. This works for quantized matrices too, and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export.onnx._graph import TRANSPOSED
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.lora.onnx import DELTA, FACTORS, MAP, AdapterInput
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.weights import find_mlps

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel


def adapter_inputs(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[str, AdapterInput]]:
    """Finds the feed-forward weights that can accept a pack.

    Args:
        checkpoint: The model on disk.
        model: The same model, loaded.

    Returns:
        Name on disk -> (name in the model, shape and digest on disk).

    Raises:
        UnsupportedModelError: The model has no feed-forward blocks that are known here.
    """
    found, stored = {}, StoredWeights(model, checkpoint)
    for block in find_mlps(model):
        for projection in block.projections:
            (_, name), *more = stored.tensors(projection.weight_name)
            shape = checkpoint.info(name).shape
            if more or len(shape) != 2:
                raise CheckpointFormatError(f"{name} has shape {list(shape)}; expected a matrix of its own")
            state = sha256()
            for part in checkpoint.read_all(name):
                state.update(part)
            found[name] = (projection.weight_name, AdapterInput((shape[0], shape[1]), state.hexdigest()))
    return found


def add_inputs(model: ir.Model, weights: Mapping[str, str]) -> None:
    """Adds the three inputs of each weight that accepts a pack.

    Args:
        model: The graph; changed in place.
        weights: Name on disk, which names the inputs -> name in transformers.

    Raises:
        UnsupportedModelError: The graph has no product with one of them.
    """
    products = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "MatMulNBits") and node.inputs[1] is not None:
            products[str(node.inputs[1].name).partition(TRANSPOSED)[0]] = node
    for stored, weight in weights.items():
        module = weight.removesuffix(".weight")
        if module not in products:
            raise UnsupportedModelError(
                f"the graph has no product with {weight}, so it cannot accept a pack there",
                advice="Export without --adapter-ready and merge packs into the weights.",
            )
        _add(model.graph, products[module], stored.removesuffix(".weight"))


def _add(graph: ir.Graph, node: ir.Node, module: str) -> None:
    import onnx_ir as ir

    given, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    rows = result.shape[-1] if result.shape is not None else None
    if node.op_type == "MatMulNBits":
        width: object = int(node.attributes["K"].as_int())
    else:
        width = weight.shape[0] if weight is not None and weight.shape is not None else None
    if not isinstance(rows, int) or not isinstance(width, int) or result.dtype is None:
        raise UnsupportedModelError(f"the graph has no fixed shape for {module}")
    kind, vectors, columns = result.dtype.numpy(), f"{module}.vectors", f"{module}.columns"
    delta = _overridable(graph, module + DELTA, np.zeros((width, 1), kind), [width, vectors])
    factors = _overridable(graph, module + FACTORS, np.zeros((1, 1), kind), [vectors, columns])
    place = _overridable(graph, module + MAP, np.zeros(rows, np.int32), [rows])
    product = ir.node("MatMul", [given, delta], name=f"{module}.nest/MatMul")
    combined = ir.node("MatMul", [product.outputs[0], factors], name=f"{module}.nest/Factors")
    gather = ir.node("Gather", [combined.outputs[0], place], {"axis": -1}, name=f"{module}.nest/Gather")
    add = ir.node("Add", [result, gather.outputs[0]], name=f"{module}.nest/Add")
    for new, part in ((product, "product"), (combined, "combined"), (gather, "change"), (add, "patched")):
        new.outputs[0].name = f"{module}.nest_{part}"
        new.outputs[0].dtype = result.dtype
    gather.outputs[0].shape = add.outputs[0].shape = result.shape
    ir.convenience.replace_all_uses_with(result, add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, result)
    graph.insert_after(node, [product, combined, gather, add])


def _overridable(graph: ir.Graph, name: str, content: np.ndarray, shape: list[int | str]) -> ir.Value:
    """An initializer that is an input too, so that a caller may replace it."""
    import onnx_ir as ir

    tensor = ir.tensor(content, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
