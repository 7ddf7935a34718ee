"""ONNX models as checkpoints, wherever they come from: torch, optimum, the onnxruntime-genai builder, or this package.

Tensors have their names in the model, and can also be asked for by the names that packs use (_finder.py). A row is what one
neuron has, as in packs, though most files store the transposed matrix, or quantized blocks in several tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointError, CheckpointFormatError, UnsupportedModelError
from nestpatch.formats._rowio import read_all_at
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.formats.onnx._finder import Finder
from nestpatch.formats.onnx._layout import JoinedLayout, Layout, RowLayout, Segment
from nestpatch.formats.onnx._tensors import Initializer
from nestpatch.formats.onnx._weights import WAY_OUT, Form, Stored, find_weights, refusal, stored
from nestpatch.formats.onnx.folder import only_model
from nestpatch.formats.onnx.graph import read_graph
from nestpatch.rows import DTYPES, Rows


@dataclass(frozen=True)
class _View:
    """A tensor as the checkpoint presents it."""

    info: TensorInfo
    layout: Layout | None
    """None where it has no rows that can be patched."""
    refusal: CheckpointError | None = None
    """Why they cannot be patched."""


class OnnxCheckpoint(Checkpoint):
    """An ONNX model. The graph is read when it is opened, rows on demand."""

    converted = True

    def __init__(self, path: Path) -> None:
        """Opens a model.

        Args:
            path: A .onnx file, or a directory with one.

        Raises:
            CheckpointFormatError: The file contradicts itself or its data, or the directory holds several models or none.
        """
        self.path = path
        self.file = only_model(path) if path.is_dir() else path
        graph = read_graph(self.file)
        self._tensors, self._metadata = graph.tensors, graph.metadata
        self._weights = find_weights(graph)
        self._finder = Finder(graph, self._weights)
        data = {tensor.file for tensor in self._tensors.values()} - {self.file}
        self.files: tuple[Path, ...] = (self.file, *sorted(data))
        self._by_tensor = {weight.tensor.name: weight for weight in reversed(self._weights)}
        self._views: dict[str, _View | None] = {}

    def reopen(self, path: Path) -> OnnxCheckpoint:
        """Opens another path as the same format, whatever its name; of a directory, the model with the same name.

        Args:
            path: The other model.

        Returns:
            The other model.

        Raises:
            CheckpointFormatError: It is not a model of this format.
        """
        return OnnxCheckpoint(path / self.file.name if path.is_dir() and not self.path.is_dir() else path)

    def tensors(self) -> Sequence[str]:
        """The names of all tensors with their own bytes, sorted; scales belong to the weights that they scale."""
        blocks = [weight for weight in self._weights if weight.form is Form.BLOCKS]
        parts = {name for weight in blocks if self._own(weight.tensor).layout for name in weight.node.inputs[2:4]}
        return sorted(name for name, tensor in self._tensors.items() if tensor.offset >= 0 and name not in parts)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Its name in the file, or the name that packs use.
        """
        return self._view(name) is not None

    def info(self, name: str) -> TensorInfo:
        """What a tensor is and where it is stored.

        Args:
            name: Its name in the model, or the name that packs use.

        Returns:
            Its type, shape, place and coding, under the name that was asked for.

        Raises:
            CheckpointFormatError: There is no such tensor.
            UnsupportedModelError: Several weights match the name.
        """
        return self._known(name).info

    def _known(self, name: str) -> _View:
        view = self._view(name)
        if view is None:
            raise CheckpointFormatError(
                f"{self.file} has no tensor {name}",
                advice="Neither names nor the graph's shape identify it. Export the model anew, with the names of its weights.",
            )
        return view

    def _view(self, name: str) -> _View | None:
        if name not in self._views:
            tensor = self._tensors.get(name)
            self._views[name] = self._own(tensor) if tensor is not None else self._found(name)
        return self._views[name]

    def _own(self, tensor: Initializer) -> _View:
        """A tensor of the model by its name there."""
        weight = self._by_tensor.get(tensor.name)
        try:
            if weight is not None:
                return _view(tensor.name, [(stored(weight, self._tensors), 0, weight.rows)], weight.width)
            problem: CheckpointError | None = refusal(tensor, tensor.trouble) if tensor.trouble else None
        except CheckpointError as error:
            problem = error
        info = TensorInfo(tensor.name, tensor.dtype, tensor.shape, tensor.file, max(0, tensor.offset), tensor.nbytes)
        has_rows = problem is None and info.plain and len(info.shape) > 1 and info.nbytes
        return _View(info, RowLayout(info) if has_rows else None, problem)

    def _found(self, name: str) -> _View | None:
        """A tensor by the name that packs use: rows of one weight, or of two."""
        halves = self._finder.find(name)
        if not halves:
            return None
        parts = [(stored(half.weight, self._tensors), half.start, half.rows) for half in halves]
        if len({(part.dtype, half.weight.width) for (part, *_), half in zip(parts, halves, strict=True)}) > 1:
            raise UnsupportedModelError(f"the halves of {name} are stored in different ways", advice=WAY_OUT)
        return _view(name, parts, halves[0].weight.width)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads some rows; consecutive ones are read together.

        Args:
            name: The tensor.
            rows: Sorted row numbers.

        Returns:
            [rows, in_features] of the float types, uint8 [rows, row_bytes] of the quantized ones.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched, or the file ends before them.
            UnsupportedModelError: Several weights match the name, or its rows must not be changed.
            QuantizationError: Its quantization cannot be written.
        """
        info, layout = self._rows_of(name)
        return layout.read(np.asarray(rows, np.int64)).view(DTYPES.get(info.dtype, np.dtype(np.uint8)))

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes some rows in place; consecutive ones are written together.

        Args:
            name: The tensor.
            rows: Sorted row numbers.
            values: In the form that `read_rows` returns.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched.
            UnsupportedModelError: Several weights match the name, or its rows must not be changed.
            QuantizationError: Its quantization cannot be written.
        """
        info, layout = self._rows_of(name)
        data = np.ascontiguousarray(values, dtype=DTYPES.get(info.dtype, np.dtype(np.uint8)))
        layout.write(np.asarray(rows, np.int64), data.view(np.uint8))

    def _rows_of(self, name: str) -> tuple[TensorInfo, Layout]:
        view = self._known(name)
        if view.refusal is not None:
            raise view.refusal.with_traceback(None)
        if view.layout is None:
            raise CheckpointFormatError(
                f"tensor {name} has the type {view.info.dtype} and the shape {list(view.info.shape)}: it has no rows to patch"
            )
        return view.info, view.layout

    def read_all(self, name: str) -> Iterator[bytes]:
        """Reads a tensor whole, in blocks.

        Args:
            name: The tensor.

        Yields:
            Its bytes, in the order in which rows are numbered.

        Raises:
            CheckpointFormatError: There is no such tensor, or the file ends inside it.
        """
        view = self._known(name)
        if view.layout is None:
            yield from read_all_at(view.info)
            return
        for part in view.info.blocks(view.info.rows):
            yield view.layout.read(np.arange(part.start, part.stop)).tobytes()

    def metadata(self) -> Mapping[str, Any]:
        """The model's metadata_props, and the tool that wrote it as producer_name."""
        return self._metadata


def _view(name: str, parts: Sequence[tuple[Stored, int, int]], width: int) -> _View:
    """Rows of weights as one matrix. parts: (weight, first row, rows)."""
    layout: Layout = JoinedLayout(*(Segment(part.layout, start, rows) for part, start, rows in parts))
    if len(parts) == 1 and parts[0][2] == parts[0][0].layout.rows:
        layout = parts[0][0].layout
    first, *others = layout.files
    shape, nbytes = (layout.rows, width), layout.rows * layout.row_bytes
    found = parts[0][0]
    info = TensorInfo(name, found.dtype, shape, first, layout.offset, nbytes, found.codec, tuple(others), layout.chunks)
    return _View(info, layout)
