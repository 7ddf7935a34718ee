"""A transformers model as one ONNX decoder graph with a KV cache, for prompts and for single tokens.

Inputs and outputs have the names and dimensions that onnxruntime-genai, transformers.js and optimum expect of a decoder.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from nestpatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

TRANSPOSED = ".MatMul.weight"
"""Suffix of a Linear's weight that is stored as [in, out], as in the files of onnxruntime-genai."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata that torch adds to every node: the list of the modules that it comes from, outermost first."""


OPSET = 20
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
"""Dimensions. transformers.js finds the shape of the cache by the name batch_size."""
_NOISY = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches for each token: heads, and the width of a key and of a value."""

    heads: int
    key: int
    value: int


class _Flat(nn.Module):
    """The model as a function of tensors alone: the cache is a list, key and value by layer."""

    def __init__(self, whole: PreTrainedModel) -> None:
        super().__init__()
        self.whole = whole

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        # Without a config every layer keeps all tokens, also those with a sliding window: the mask hides the others.
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.whole(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)))


def require_dense(model: PreTrainedModel) -> None:
    """Rejects a mixture of experts, which torch would trace for minutes before it fails.

    Args:
        model: The model.

    Raises:
        UnsupportedModelError: It is one.
    """
    stacks = [name for name, module in model.named_modules() if "expert" in name or "Experts" in type(module).__name__]
    if stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a mixture of experts ({stacks[0]}), and an ONNX graph cannot run only the chosen ones",
            advice="Serve its safetensors files, or a GGUF file: nestpatch export MODEL PACK --to gguf",
        )


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> tuple[CacheShape, ...]:
    """Measures what each layer caches by running the model on two tokens: configurations differ too much.

    Args:
        model: The model.

    Returns:
        The shapes, one per layer.

    Raises:
        UnsupportedModelError: The model has no cache of keys and values.
    """
    ids = torch.zeros(1, 2, dtype=torch.long)
    try:
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
        shapes = [(layer.keys.shape, layer.values.shape) for layer in layers]
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no keys and values that an ONNX decoder could return: {error}",
            advice="Models with attention in every layer can be exported.",
        ) from error
    return tuple(CacheShape(int(key[1]), int(key[3]), int(value[3])) for key, value in shapes)


def decoder_graph(model: PreTrainedModel, shapes: Sequence[CacheShape]) -> ir.Model:
    """Traces the model into a graph that shares its weights. Takes minutes for billions of weights.

    input_ids, attention_mask, position_ids: int64 [batch, sequence], [batch, past + sequence], [batch, sequence];
    past_key_values.N.key and .value: [batch, heads, past, width] -> logits [batch, sequence, vocabulary] and
    present.N.key, .value. Weights have their names in transformers; a transposed one ends in ".MatMul.weight", [in, out].

    Args:
        model: The model.
        shapes: What `cache_shapes` returns for it.

    Returns:
        The graph.

    Raises:
        UnsupportedModelError: torch cannot trace it; the message has the reason.
    """
    from onnx_ir.passes import common

    flat = _Flat(model).eval()
    kept = [f"{number}.{part}" for number in range(len(shapes)) for part in ("key", "value")]
    arguments, dimensions = _example(model.dtype, shapes)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                flat,
                arguments,
                dynamo=True,
                dynamic_shapes=dimensions,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in kept)],
                output_names=["logits", *(f"present.{name}" for name in kept)],
            )
    except Exception as error:  # torch raises the errors of the model's code
        raise UnsupportedModelError(
            f"torch cannot trace {type(model).__name__} into an ONNX graph: {_first_line(error)}",
            advice="Its code branches on the content of a tensor, or uses an operator that ONNX lacks. Export to GGUF instead.",
        ) from error
    if program is None:  # allowed by torch's signature, for older exporters
        raise UnsupportedModelError(f"torch returned no ONNX graph of {type(model).__name__}")
    found: ir.Model = program.model
    _rename(found, model, prefix="whole.")
    # Metadata of the tracing is most of the file, and contains stack traces with paths of this machine.
    common.ClearMetadataAndDocStringPass()(found)
    common.NameFixPass()(found)
    for output in found.graph.outputs[1:]:
        if output.shape is not None:
            output.shape[2] = TOTAL  # torch writes a sum here; other tools compare names
    return found


def _rename(model: ir.Model, source: PreTrainedModel, prefix: str) -> None:
    """Renames initializers and the nodes that use them; `prefix` is the traced module's prefix of each name.

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
        assert weight is not None  # noqa: S101 - checked by _linears
        node.name = f"/{re.sub(r'[.](?![0-9])', '/', module)}/MatMul"
        shape = tuple(weight.shape or ())
        if weight.is_initializer() and sizes.get(f"{module}.weight") == shape[::-1]:
            wanted = module + TRANSPOSED
            # Only names that torch made up are replaced.
            if str(weight.name).startswith("val_") and wanted not in graph.initializers:
                weight.name = wanted


def _linears(graph: ir.Graph, prefix: str) -> Iterator[tuple[ir.Node, str]]:
    """The matrix products with a weight, and the module of each."""
    for node in graph.all_nodes():
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        if len(scopes) > 1 and scopes[-2].startswith(prefix):
            yield node, scopes[-2].removeprefix(prefix)


def _example(dtype: torch.dtype, shapes: Sequence[CacheShape]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(arguments to trace with, their dynamic dimensions).

    All sizes are over one and different: torch treats 0 and 1 as constants, and equal sizes as one dimension.
    """
    batch, past, sequence = 2, 5, 3
    widths = [(shape.heads, width) for shape in shapes for width in (shape.key, shape.value)]
    cache = [torch.zeros(batch, heads, past, width, dtype=dtype) for heads, width in widths]
    positions = torch.arange(past, past + sequence).repeat(batch, 1)
    ids = torch.ones(batch, sequence, dtype=torch.long)
    mask = torch.ones(batch, past + sequence, dtype=torch.long)
    one = {0: BATCH, 1: SEQUENCE}
    return (ids, mask, positions, cache), (one, {0: BATCH, 1: TOTAL}, one, [{0: BATCH, 2: PAST} for _ in cache])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's warnings about torchvision, axis names and its own deprecated parts."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    """The innermost cause, without the pages that torch adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
