"""Matrices that a GGUF file holds in another way than the checkpoint: stacks of experts, fused halves, reordered rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import UnsupportedModelError
from nestpatch.patcher.inplace import apply_in_place, revert
from tests.gguf.files import digest, values, write_gguf
from tests.helpers import load_tensors, tiny_pack, write_checkpoint


def experts(folder: Path, architecture: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint whose layer 0 has three experts, and the stacked tensors of a GGUF file."""
    random = np.random.default_rng(1)
    prefix = {"llama": "model.layers.0.block_sparse_moe.experts", "qwen3moe": "model.layers.0.mlp.experts"}[architecture]
    parts = {"llama": ("w1", "w3"), "qwen3moe": ("gate_proj", "up_proj")}[architecture]
    stacks = {part: (0.1 * random.standard_normal((3, 64, 256))).astype(np.float32) for part in parts}
    tensors = {f"{prefix}.{e}.{part}.weight": stack[e] for part, stack in stacks.items() for e in range(3)}
    gguf_tensors = dict(zip(("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"), stacks.values(), strict=True))
    return write_checkpoint(folder, tensors), gguf_tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_experts_are_found_in_their_stack(architecture: str, tmp_path: Path) -> None:
    model, stacks = experts(tmp_path / "moe", architecture)
    path = write_gguf(tmp_path / "moe.gguf", stacks, "Q8_0", architecture=architecture)
    names = [n for n in load_tensors(model) if ".1." in n or ".2." in n.partition("experts")[2]]
    pack = tiny_pack(model, neurons=7, tensors=names)
    original, before = digest(path), values(path)
    apply_in_place(path, pack, base=model)
    after = values(path)
    for delta in pack.deltas:
        expert = int(delta.name.partition("experts.")[2][0])
        name = f"blk.0.ffn_{'gate' if 'gate' in delta.name or 'w1' in delta.name else 'up'}_exps.weight"
        rows = delta.rows + 64 * expert
        changed = np.flatnonzero((before[name] != after[name]).any(axis=1))
        assert set(rows.tolist()) <= set(changed.tolist())
        assert np.allclose(after[name][rows] - before[name][rows], delta.dense(), atol=0.01)
    revert(path)
    assert digest(path) == original


def test_fused_gate_and_up(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    fused = {"model.layers.0.mlp.gate_up_proj.weight": (0.1 * random.standard_normal((64, 256))).astype(np.float32)}
    model = write_checkpoint(tmp_path / "phi", fused)
    path = write_gguf(tmp_path / "phi.gguf", {"blk.0.ffn_up.weight": next(iter(fused.values()))}, "Q8_0", architecture="phi3")
    pack = tiny_pack(model, neurons=7, tensors=list(fused))
    apply_in_place(path, pack, base=model)
    moved = values(path)["blk.0.ffn_up.weight"] - next(iter(fused.values()))
    assert np.allclose(moved[pack.deltas[0].rows], pack.deltas[0].dense(), atol=0.01)


def test_rows_in_another_order_are_refused_by_name(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {name: (0.1 * random.standard_normal((64, 256))).astype(np.float32)}
    model = write_checkpoint(tmp_path / "m", tensors)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": tensors[name]}, "Q8_0")
    with pytest.raises(UnsupportedModelError, match="another order"):
        apply_in_place(path, tiny_pack(model, neurons=7, tensors=[name]))
