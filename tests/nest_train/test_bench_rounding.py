"""The option `--round-to` of bench.efficacy: rows of a float base are rounded as a quantized file rounds them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench._rounding import rounded_as
from nestpatch.errors import QuantizationError
from nestpatch.export.onnx._quantize import quantize_matrix
from nestpatch.formats.checkpoint import float_rows
from nestpatch.formats.gguf.quants import codec
from nestpatch.formats.opening import open_checkpoint
from nestpatch.runtimes.stored import StoredWeights
from tests.gguf_files import write_gguf
from tests.nest_train.test_quantized_base import attachable, effective


def int4(rows: np.ndarray) -> np.ndarray:
    """Rows as the export to ONNX quantizes them, by onnxruntime's own function."""
    pytest.importorskip("onnxruntime")
    packed, scales = quantize_matrix(np.ascontiguousarray(rows.T), 4)
    numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, -1).astype(np.float32)
    return ((numbers - 8) * scales[..., None]).reshape(len(rows), -1)


def gguf_type(name: str) -> Any:
    return lambda rows: codec(name).decode(codec(name).encode(rows))


@pytest.mark.parametrize(("kind", "rounded"), [("q8_0", gguf_type("Q8_0")), ("q4_0", gguf_type("Q4_0")), ("int4", int4)])
def test_rows_of_a_float_base_are_rounded(models: Any, kind: str, rounded: Any) -> None:
    model, deltas = attachable(models("llama"))
    checkpoint = open_checkpoint(models("llama"))
    assert deltas.quantize_like(StoredWeights(model, checkpoint), partial(rounded_as, kind)) == [kind.upper()]
    for projection, delta in deltas.places:
        rows = delta.rows.numpy()
        sums = float_rows(checkpoint, projection.weight_name, rows) + delta.delta.detach().numpy()[delta.cluster.numpy()]
        wanted = rounded(sums)
        assert np.allclose(effective(delta)[rows].numpy(), wanted, atol=1e-5)
        assert not np.allclose(wanted, sums, atol=1e-3), "the rounding changes these rows"


def test_a_named_type_takes_the_place_of_that_of_the_file(models: Any, tmp_path: Path) -> None:
    file = write_gguf(models("llama"), tmp_path / "m.gguf", "Q4_1")
    model, deltas = attachable(file)
    stored = StoredWeights(model, open_checkpoint(file))
    assert deltas.quantize_like(stored) == deltas.quantize_like(stored, partial(rounded_as, "own")) == ["Q4_1"]
    own = effective(deltas.modules[0])
    assert deltas.quantize_like(stored, partial(rounded_as, "q8_0")) == ["Q8_0"]
    assert not torch.equal(effective(deltas.modules[0]), own)
    assert deltas.quantize_like(stored, partial(rounded_as, "none")) == []
    assert all(delta.residual is None for delta in deltas.modules)


def test_blocks_that_do_not_fit_are_refused(models: Any) -> None:
    info = open_checkpoint(models("llama")).info("model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(
        QuantizationError, match="have 32 numbers, which do not fit into blocks of q4_k, which have 256"
    ) as caught:
        rounded_as("q4_k", info)
    assert "q5_0" in caught.value.advice
