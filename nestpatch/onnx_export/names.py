"""Weights of a traced graph get back the names that they have in transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

TRANSPOSED = ".MatMul.weight"
"""Ends the name of a Linear's weight that is stored as [in, out], as in the files of onnxruntime-genai."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata that torch leaves on every node: the list of the modules that it came from, outermost first."""


def hf_names(model: ir.Model, source: PreTrainedModel, prefix: str) -> None:
    """Renames initializers and the nodes that use them; `prefix` is what the traced module puts before each name.

    A weight with two names (tied embeddings) gets the first one, which is the one on disk.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(value), name) for name, value in source.named_parameters(remove_duplicate=False)}
    sizes = {name: tuple(value.shape) for name, value in source.named_parameters()}
    graph = model.graph
    for value in list(graph.initializers.values()):
        if (own := str(value.name)).startswith(prefix):
            plain = own.removeprefix(prefix)
            value.name = names.get(plain, plain)
    for node, module in _linears(graph, prefix):
        weight = node.inputs[1]
        assert weight is not None  # noqa: S101 - _linears looked
        node.name = f"/{re.sub(r'[.](?![0-9])', '/', module)}/MatMul"
        shape = tuple(weight.shape or ())
        if weight.is_initializer() and sizes.get(f"{module}.weight") == shape[::-1]:
            wanted = module + TRANSPOSED
            # Anything that torch has named itself stays: its name is known already.
            if str(weight.name).startswith("val_") and wanted not in graph.initializers:
                weight.name = wanted


def _linears(graph: ir.Graph, prefix: str) -> Iterator[tuple[ir.Node, str]]:
    """The matrix products with a weight, and the module that each came from."""
    for node in graph.all_nodes():
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        if len(scopes) > 1 and scopes[-2].startswith(prefix):
            yield node, scopes[-2].removeprefix(prefix)
