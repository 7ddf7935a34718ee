"""The graph of an ONNX model: its nodes and tensors, read without loading weights.

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto gives the field numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nestpatch.errors import CheckpointFormatError, NestpatchError
from nestpatch.files.reading import open_regular
from nestpatch.formats.onnx._tensors import Initializer, check_overlaps, read_tensor
from nestpatch.formats.protobuf import MAX_TEXT, VARINT, Field, Wire

MAX_NODES = 500_000
"""Nodes, and tensors."""
MAX_DEPTH = 8
"""Graphs inside nodes inside graphs."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key in which torch.onnx.export names the modules of a node."""
_MODEL_PRODUCER, _MODEL_GRAPH, _MODEL_METADATA = 2, 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 1, 5, 11
_INPUT_NAME, _ELEMENT_TYPE = 1, (2, 1, 1)
"""ValueInfoProto.name; and ValueInfoProto.type, TypeProto.tensor_type, TypeProto.Tensor.elem_type."""
_INPUT, _OUTPUT, _NAME, _OP, _ATTRIBUTE, _DOMAIN, _METADATA = 1, 2, 3, 4, 5, 7, 9
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_INTS, _ATTRIBUTE_GRAPHS = 1, 3, 5, 6, 8, 11
_KEY, _VALUE = 1, 2


@dataclass(frozen=True, eq=False)
class Node:
    """One operation."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    """Names of values; "" for an optional one that is left out."""
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]
    """Attributes that are an integer."""
    lists: Mapping[str, tuple[int, ...]]
    """Attributes that are several integers."""
    scopes: tuple[str, ...]
    """Names of the modules that it belongs to, outermost first; empty where the exporter wrote none."""


@dataclass(frozen=True)
class Graph:
    """The content of a model; the graphs inside nodes are flattened into it."""

    nodes: tuple[Node, ...]
    """In the order in which they run."""
    tensors: Mapping[str, Initializer]
    inputs: Mapping[str, int]
    """Name of an input of the model -> ONNX's number of its element type; 0 where that is not stated."""
    metadata: Mapping[str, str]
    """metadata_props, and the tool that wrote the model as producer_name. Values over 1 MiB are read as empty."""


def read_graph(path: Path) -> Graph:
    """Reads and checks a model file. Weights are not loaded.

    Args:
        path: A .onnx file.

    Returns:
        Its graph.

    Raises:
        CheckpointFormatError: The file cannot be read, is not an ONNX model, or contradicts itself or its data.
    """
    try:
        with open_regular(path) as file:
            return _Reader(path, Wire(file, os.fstat(file.fileno()).st_size)).model()
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except NestpatchError:
        raise
    except (ValueError, MemoryError) as error:
        raise CheckpointFormatError(f"{path} is not a sound ONNX model: {error}") from error


@dataclass
class _Reader:
    path: Path
    wire: Wire
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Initializer] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)

    def model(self) -> Graph:
        metadata: dict[str, str] = {}
        graphs = 0
        for found in self.wire.fields(0, self.wire.size):
            if found.number == _MODEL_GRAPH:
                graphs += 1
                self._graph(found, 0)
            elif found.number == _MODEL_METADATA:
                metadata.update([self._entry(found)])
            elif found.number == _MODEL_PRODUCER:
                metadata["producer_name"] = self.wire.text(found)
        if graphs != 1:
            raise ValueError("it has no graph" if not graphs else f"it has {graphs} graphs")
        return Graph(tuple(self.nodes), check_overlaps(self.path, self.tensors), self.inputs, metadata)

    def _graph(self, message: Field, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"its graphs are nested more than {MAX_DEPTH} deep")
        own: set[str] = set()
        for found in self.wire.nested(message):
            if max(len(self.nodes), len(self.tensors)) > MAX_NODES:
                raise ValueError(f"it has more than {MAX_NODES} nodes or tensors")
            if found.number == _GRAPH_NODE:
                self._node(found, depth)
            elif found.number == _GRAPH_INITIALIZER:
                tensor = read_tensor(self.wire, found, self.path)
                if tensor.name in own:
                    raise ValueError(f"duplicate tensor {tensor.name[:80]!r}")
                own.add(tensor.name)
                self._add(tensor)
            elif found.number == _GRAPH_INPUT and depth == 0:
                name, kind = self._find(found, _INPUT_NAME), self._find(found, *_ELEMENT_TYPE)
                if name is not None:
                    self.inputs[self.wire.text(name)] = kind.value if kind is not None and kind.kind == VARINT else 0

    def _find(self, message: Field, *path: int) -> Field | None:
        """The first field with a number; with several, of the message in the field before."""
        found: Field | None = message
        for number in path:
            if found is None:
                return None
            found = next((inner for inner in self.wire.nested(found) if inner.number == number), None)
        return found

    def _add(self, tensor: Initializer) -> None:
        # Graphs inside nodes have names of their own.
        twice = tensor.name in self.tensors
        trouble = "several graphs of the model have a tensor of this name" if twice else tensor.trouble
        self.tensors[tensor.name] = replace(tensor, trouble=trouble)

    def _node(self, message: Field, depth: int) -> None:
        texts = {_NAME: "", _OP: "", _DOMAIN: ""}
        values: dict[int, list[str]] = {_INPUT: [], _OUTPUT: []}
        scopes: tuple[str, ...] = ()
        attributes = _Attributes()
        for found in self.wire.nested(message):
            if found.number in texts:
                texts[found.number] = self.wire.text(found)
            elif found.number in values:
                values[found.number].append(self.wire.text(found))
            elif found.number == _ATTRIBUTE:
                self._attribute(found, attributes, depth)
            elif found.number == _METADATA:
                key, value = self._entry(found)
                if key == _SCOPES:
                    scopes = tuple(re.findall(r"'([^']*)'", value)) or scopes
        name, op, domain = texts.values()
        inputs, outputs = (tuple(names) for names in values.values())
        self.nodes.append(Node(op, domain, name, inputs, outputs, attributes.numbers, attributes.lists, scopes))
        if op == "Constant" and attributes.tensor is not None and outputs:
            self._add(replace(attributes.tensor, name=outputs[0]))

    def _attribute(self, message: Field, attributes: _Attributes, depth: int) -> None:
        name, numbers, lists = "", list[int](), list[int]()
        for found in self.wire.nested(message):
            if found.number == _ATTRIBUTE_NAME:
                name = self.wire.text(found)
            elif found.number == _ATTRIBUTE_INT:
                numbers += self.wire.numbers(found)
            elif found.number == _ATTRIBUTE_INTS:
                lists += self.wire.numbers(found)
            elif found.number == _ATTRIBUTE_TENSOR:
                attributes.tensor = read_tensor(self.wire, found, self.path)
            elif found.number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                self._graph(found, depth + 1)
        if numbers:
            attributes.numbers[name] = numbers[-1]
        if lists:
            attributes.lists[name] = tuple(lists)

    def _entry(self, message: Field) -> tuple[str, str]:
        """Key and value. Long values, such as stack traces, are read as empty."""
        parts = {found.number: found for found in self.wire.nested(message)}
        texts = (self.wire.text(parts[n]) if n in parts and parts[n].size <= MAX_TEXT else "" for n in (_KEY, _VALUE))
        key, value = texts
        return key, value


@dataclass
class _Attributes:
    """The attributes of a node that nestpatch uses."""

    numbers: dict[str, int] = field(default_factory=dict)
    lists: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensor: Initializer | None = None
