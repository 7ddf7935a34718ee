"""Deltas in the directions that benign inputs hardly use: they change little there, by construction.

Source: the projector of GuardSpace (arXiv 2510.14301), with benign prompts as what is protected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bench.methods._scene import Attempt, Method, Scene
from bench.methods.nest import Deltas
from nestpatch.nest_train._neurons import Clusters
from nestpatch.runtimes.text import collate
from nestpatch.runtimes.weights import MlpBlock

_SHARE = 0.01
"""Of the energy of benign inputs that lies in the directions that may be used. GuardSpace's limit for a single eigenvalue, 1e-6
of the largest, can leave nothing."""
_BATCH = 32


class ProjectedDeltas(Deltas):
    """Deltas that are projected after every step.

    Args:
        blocks: The model's feed-forward blocks.
        clusters: The groups of neurons of each block.
        projectors: Layer -> float32 [in, in].
    """

    def __init__(self, blocks: Sequence[MlpBlock], clusters: Sequence[Clusters], projectors: dict[int, torch.Tensor]) -> None:
        super().__init__(blocks, clusters)
        used = [block for block, group in zip(blocks, clusters, strict=True) if group.k]
        self._projectors = [projectors[block.layer] for block in used for _ in block.projections]

    @torch.no_grad()
    def round_rows(self) -> None:
        """Projects the deltas, then rounds as all deltas are rounded."""
        for module, projector in zip(self.modules, self._projectors, strict=True):
            module.delta.copy_(module.delta @ projector)
        super().round_rows()


@torch.no_grad()
def covariances(scene: Scene, blocks: Sequence[MlpBlock]) -> dict[int, torch.Tensor]:
    """Layer -> the uncentred covariance of what its block reads in harmless prompts and answers, float64 [in, in]."""
    found: dict[int, torch.Tensor] = {}
    real = torch.empty(0, dtype=torch.bool)

    def add(layer: int, inputs: torch.Tensor) -> None:
        rows = inputs[real].float()
        found[layer] = found.get(layer, 0) + (rows.T @ rows).double().cpu()

    def hook(layer: int) -> torch.utils.hooks.RemovableHandle:
        linear: nn.Module = scene.blocks[layer].projections[0].linear
        return linear.register_forward_pre_hook(lambda _, args: add(layer, args[0]))

    handles = [hook(block.layer) for block in blocks]
    pairs = sorted((e.tokens for e in scene.examples.harmless), key=lambda pair: len(pair.prompt))
    try:
        for start in range(0, len(pairs), _BATCH):
            ids, mask, _ = collate(pairs[start : start + _BATCH], scene.run.pad, scene.run.model.device)
            real = mask.bool()
            scene.run.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def projector(covariance: torch.Tensor) -> torch.Tensor:
    """float32 [in, in]: onto the eigenvectors of the smallest eigenvalues, which sum to `_SHARE` of all; at least onto one."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = vectors[:, : max(1, int((values.clamp(min=0).cumsum(0) <= _SHARE * values.sum()).sum()))]
    return (kept @ kept.T).float()


def _null_space(scene: Scene) -> Attempt:
    layers = scene.layers()
    clusters = [group for _, group in layers]
    used = [block for block, group in zip(scene.blocks, clusters, strict=True) if group.k]
    device = scene.run.model.device
    projectors = {layer: projector(c).to(device) for layer, c in covariances(scene, used).items()}
    ranks = sorted(round(p.trace().item()) for p in projectors.values())
    scene.run.decide("null space", "", f"{ranks[0]} to {ranks[-1]} of {len(next(iter(projectors.values())))} directions")
    return Attempt(ProjectedDeltas(scene.blocks, clusters, projectors), scene.examples, layers=layers)


METHODS = (Method("null-space", f"deltas in directions with {_SHARE:.0%} of the energy of benign inputs", _null_space),)
