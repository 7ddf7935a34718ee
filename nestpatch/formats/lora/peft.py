"""A pack as a PEFT adapter: a directory that PeftModel.from_pretrained and vLLM load.

`lora_A` [r, in_features] and `lora_B` [out_features, r] for each module, F32. vLLM has one rank for all modules, so they are
padded with zeros to the largest; alpha equals it, which makes the scale 1. Experts that the base stores one by one are written
one by one, all three matrices of every expert in a layer that the pack touches: PEFT and vLLM load all of them or none.
Stacked experts [experts, out, in] are named in `target_parameters`, as PEFT expects.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import UnsupportedModelError
from nestpatch.files.atomic import sync_folder
from nestpatch.files.scratch import new_output
from nestpatch.formats.gguf.names import GGUF_ARCHITECTURES, expert_of
from nestpatch.formats.lora.factors import (
    MERGE_INSTEAD,
    Matrix,
    Part,
    Written,
    check_shape,
    require_experts,
    size_of,
    sync_size,
)
from nestpatch.formats.manifest import canonical_json
from nestpatch.formats.provenance import PACKS, packs_json
from nestpatch.pack import Pack

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# transformers loads single experts into stacks, and PEFT does the same for some classes. For others it loads an adapter without
# effect and without an error; for these two classes it was tried and works.
_SINGLE_EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
# In these classes PEFT treats all modules with the names of _EXPERT_NAMES as experts, wherever they are. Not in Qwen2Moe.
_MIXTURES = re.compile(
    r"(?!Qwen2Moe).*(?:moe|mixtral|minimax|deepseek|dots|longcat|solaropen|mellum|beam|qwen3next|flexolmo)", re.IGNORECASE
)
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# The matrices of an expert: gate, up, and down, which is as wide as they are tall.
_TRIOS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_OTHER_WAYS = f"For llama.cpp: nestpatch export PACK --to gguf-lora. {MERGE_INSTEAD}"
# Weights stored [in, out]: their rows are inputs.
_TRANSPOSED = ("GPT2", "OpenAIGPT", "GptOss", "Llama4")


def write(pack: Pack, output: Path, strength: float = 1.0, experts: int | None = None, *, dry_run: bool = False) -> Written:
    """Writes the adapter's directory; equal packs give equal bytes. When it raises, nothing was written.

    Args:
        pack: The pack.
        output: The new directory.
        strength: How much of the deltas the adapter adds.
        experts: Experts per layer; needed where the pack changes experts that the base stores one by one.
        dry_run: Whether to compute the size only.

    Returns:
        The size of the adapter.

    Raises:
        UnsupportedModelError: A PEFT adapter cannot change the architecture, or one of the tensors.
        PackContentError: A delta times the strength is beyond float32.
        OutputError: The path exists already, cannot be written, or a factor is too large.
    """
    found = _matrices(pack, experts)
    rank = max(matrix.rank for matrix in found)
    size = size_of([(matrix, rank) for matrix in found])
    if dry_run:
        return size
    with new_output(output, directory=True) as sibling:
        (sibling / CONFIG).write_text(json.dumps(_config(pack, found, rank), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        with open(sibling / _WEIGHTS, "wb") as file:
            _write_weights(file, found, rank, strength, packs_json(pack, strength))
        nbytes = sum(sync_size(sibling / name) for name in (CONFIG, _WEIGHTS))
        sync_folder(sibling)
    return Written(size.matrices, size.rank, nbytes)


def _matrices(pack: Pack, experts: int | None) -> list[Matrix]:
    """The matrices of a pack by the names of their modules, or of their parameters for stacked experts."""
    base = pack.manifest.base
    if base.architecture.startswith(_TRANSPOSED):
        raise UnsupportedModelError(
            f"{base.architecture} stores its matrices transposed, which these adapters do not", advice=MERGE_INSTEAD
        )
    found: dict[str, Matrix] = {}
    for delta in pack:
        shape = base.tensors[delta.name].shape
        check_shape(delta, shape)
        matrix = _matrix(pack, delta, shape)
        found[matrix.name] = matrix
        if len(shape) == 2 and expert_of(delta.name):
            for blank in _blanks(delta, (matrix.rows, matrix.width), base.architecture, experts):
                found.setdefault(blank.name, blank)
    return [found[name] for name in sorted(found)]


def _matrix(pack: Pack, delta: TensorDelta, shape: tuple[int, ...]) -> Matrix:
    architecture, module = pack.manifest.base.architecture, delta.name.removesuffix(".weight")
    # What was saved without its head: "layers.0..." is "model.layers.0..." in a causal model.
    if module.startswith("layers.") and architecture in GGUF_ARCHITECTURES:
        module = f"model.{module}"
    if len(shape) == 3:
        if architecture not in GGUF_ARCHITECTURES or not module.endswith(("gate_up_proj", "down_proj")):
            raise UnsupportedModelError(f"how {delta.name} stacks its experts is not known", advice=MERGE_INSTEAD)
        blocks = np.unique(delta.rows.astype(np.int64) // shape[1]).tolist()
        parts = tuple(Part(delta, block * shape[1], shape[1], block) for block in blocks)
        return Matrix(module, shape[1], shape[2], parts, shape[0])
    if expert_of(delta.name) is None and _MIXTURES.match(architecture) and module.rpartition(".")[2] in _EXPERT_NAMES:
        raise UnsupportedModelError(f"PEFT would treat {module} as an expert and leave it out", advice=_OTHER_WAYS)
    return Matrix(module, shape[0], shape[1], (Part(delta, 0, shape[0]),))


def _blanks(delta: TensorDelta, shape: tuple[int, int], architecture: str, experts: int | None) -> Iterator[Matrix]:
    """All matrices of all experts of a layer, unchanged, given the shape of one of them."""
    if architecture not in _SINGLE_EXPERTS:
        raise UnsupportedModelError(
            f"PEFT is not known to load adapters for single experts of {architecture}, such as {delta.name}",
            advice=_OTHER_WAYS,
        )
    stack, number, part = expert_of(delta.name) or ("", 0, "")
    trio = next((trio for trio in _TRIOS if part in trio), None)
    if trio is None:
        raise UnsupportedModelError(f"{delta.name} is not a gate, up or down matrix of an expert", advice=MERGE_INSTEAD)
    inner, outer = shape if part != trio[2] else shape[::-1]
    for expert in range(require_experts(experts, delta, number)):
        for name in trio:
            rows, width = (outer, inner) if name == trio[2] else (inner, outer)
            yield Matrix(f"{stack}.{expert}.{name}", rows, width, ())


def _config(pack: Pack, found: list[Matrix], rank: int) -> dict[str, Any]:
    """The content of adapter_config.json."""
    stacked = [matrix.name for matrix in found if matrix.experts is not None]
    modules = [matrix.name for matrix in found if matrix.experts is None]
    # Single experts became stacks, which PEFT finds by the last part of the name only.
    single = [name for name in modules if expert_of(f"{name}.weight")]
    targets = sorted({*(set(modules) - set(single)), *(name.rpartition(".")[2] for name in single)})
    base = pack.manifest.base
    parameters = {"target_parameters": stacked} if stacked else {}
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base.model_id,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": base.revision or None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **parameters,
    }


def _write_weights(file: IO[bytes], found: list[Matrix], rank: int, strength: float, packs: str) -> None:
    """Writes a safetensors file, one matrix in memory at a time. The safetensors library does not sort metadata."""
    names = {matrix.name for matrix in found}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", PACKS: packs}}
    offset = 0
    for matrix in found:
        ranks = (matrix.experts or 1) * rank
        module = matrix.name
        if matrix.experts is not None:
            module, _, part = module.rpartition(".")
            # PEFT wraps the module of stacks once per stack: `gate_up_proj` inside, `down_proj` outside.
            if part == "gate_up_proj" and f"{module}.down_proj" in names:
                module += ".base_layer"
        for factor, shape in (("lora_A", (ranks, matrix.width)), ("lora_B", (matrix.rows, ranks))):
            end = offset + 4 * shape[0] * shape[1]
            key = f"base_model.model.{module}.{factor}.weight"
            header[key] = {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
    text = canonical_json(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for matrix in found:
        a, b = matrix.factors(rank, strength)
        if matrix.experts is not None:
            # As PEFT has stacks: `a` [experts * r, in] expert by expert, `b` [out, r * experts] rank by rank.
            a, b = a.reshape(-1, matrix.width), b.transpose(1, 2, 0).reshape(matrix.rows, -1)
        for values in (a, b):
            file.write(np.ascontiguousarray(values, "<f4").data)
