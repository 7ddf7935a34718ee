"""Stages 1 and 2: activations of every feed-forward neuron, a linear probe per layer, z-scores, the neurons that matter.

Source: NeST, sections on neuron activation and selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import TrainingError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.mlps import MlpBlock
from nestpatch.runtimes.text import pad_left

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Selection:
    """What the probe of one layer found."""

    layer: int
    accuracy: float
    """On held-out prompts."""
    chance: float
    """Accuracy of always naming the more frequent class."""
    neurons: IntArray
    """Sorted indices of the kept neurons; empty when the layer is skipped."""
    z: FloatArray
    """Their z-scored probe weights."""
    reason: str


@contextmanager
def _watch(blocks: Sequence[MlpBlock]) -> Iterator[dict[int, torch.Tensor]]:
    """Fills a dict with the input of each block's output projection, [batch, tokens, neurons], at every forward pass."""
    seen: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = args[0].detach()

        return keep

    handles = [block.output.register_forward_pre_hook(hook(block.layer)) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def collect(
    model: PreTrainedModel,
    blocks: Sequence[MlpBlock],
    prompts: Sequence[Sequence[int]],
    folder: Path,
    recipe: Recipe,
    pad: int,
    on_event: OnEvent = ignore,
) -> list[FloatArray]:
    """Runs the prompts (token ids) and max-pools every neuron's activation over each prompt's tokens.

    Returns one float32 [prompts, neurons] per block, mapped from files in `folder`: memory does not grow with the prompts.
    """
    import torch

    shape = [(len(prompts), block.neurons) for block in blocks]
    pooled = [
        np.lib.format.open_memmap(folder / f"layer{block.layer}.npy", mode="w+", dtype=np.float32, shape=size)
        for block, size in zip(blocks, shape, strict=True)
    ]
    # Rows of similar length together; results go back to their own places.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with _watch(blocks) as seen, torch.inference_mode():
        for start in range(0, len(order), recipe.probe_batch):
            places = order[start : start + recipe.probe_batch]
            padded = pad_left([prompts[i] for i in places], pad)
            ids, mask = (torch.from_numpy(part).to(model.device) for part in padded)
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # no need of logits
            hidden = ~mask.bool().unsqueeze(-1)
            for block, out in zip(blocks, pooled, strict=True):
                acts = seen[block.layer].view(*mask.shape, block.neurons)
                out[places] = acts.masked_fill(hidden, -torch.inf).amax(1).float().cpu().numpy()
            on_event(Event("probe", min(start + recipe.probe_batch, len(order)), len(order)))
    return [np.asarray(out) for out in pooled]


def standardise(acts: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Each neuron (column) to mean 0 and standard deviation 1 over the prompts; constant ones to 0."""
    spread = acts.std(axis=0, dtype=np.float64)
    centred = acts - acts.mean(axis=0, dtype=np.float64)
    return np.where(spread > 1e-8, centred / np.maximum(spread, 1e-8), 0.0).astype(np.float32)


def select(layer: int, acts: FloatArray, harmful: npt.NDArray[np.bool_], recipe: Recipe) -> Selection:
    """Fits the layer's linear probe and keeps the neurons whose z-scored weight is over the threshold.

    acts: float32 [prompts, neurons]; harmful: bool [prompts].
    A layer whose probe is no better than chance on held-out prompts is skipped: its weights say nothing.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    features = standardise(acts)
    fit, held_out = train_test_split(
        np.arange(len(harmful)), test_size=recipe.probe_holdout, stratify=harmful, random_state=recipe.seed
    )
    probe = LogisticRegression(C=recipe.probe_c, max_iter=300, class_weight="balanced")
    probe.fit(features[fit], harmful[fit])
    accuracy = float(probe.score(features[held_out], harmful[held_out]))
    chance = float(max(harmful[held_out].mean(), 1 - harmful[held_out].mean()))
    weights = probe.coef_[0]
    z = ((weights - weights.mean()) / max(float(weights.std()), 1e-12)).astype(np.float32)
    # Towards 1 there is no room for a fixed margin over a high chance.
    needed = chance + recipe.probe_margin * (1 - chance) * 2
    if accuracy < needed:
        reason = f"skipped: probe accuracy {accuracy:.2f}, below {needed:.2f} (chance {chance:.2f})"
        return Selection(layer, accuracy, chance, np.empty(0, np.int64), np.empty(0, np.float32), reason)
    neurons = np.flatnonzero(np.abs(z) > recipe.threshold)
    reason = f"probe accuracy {accuracy:.2f}, {len(neurons)} of {len(z)} neurons with |z| > {recipe.threshold:g}"
    return Selection(layer, accuracy, chance, neurons, z[neurons], reason)


def require_neurons(selections: Sequence[Selection]) -> None:
    """Raises TrainingError when no layer kept a neuron."""
    if not any(len(s.neurons) for s in selections):
        found = "; ".join(f"layer {s.layer}: {s.reason}" for s in selections)
        raise TrainingError(f"no neuron tells harmful prompts from benign ones ({found})")
