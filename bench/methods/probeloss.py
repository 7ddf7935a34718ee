"""No refusal texts: harmful prompts are to look more harmful to probes of the base.

Source: the loss of Q-realign (arXiv 2601.08089), softplus(-(w h + b)) of the last prompt token, with a sparse probe per layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import softplus

from bench.methods._scene import Attempt, Method, Scene, watched
from bench.methods.nest import attempt
from nestpatch.nest_train._neurons import standardise
from nestpatch.nest_train._targets import Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import batch_loss
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.text import by_length, pad_left

_SPARSITY = 1.0
"""Inverse L1 strength of the probes."""


class ProbeLoss:
    """Probes of the base's hidden states, and the loss that they give.

    Args:
        scene: The base; the probes are fitted to its training prompts.
        first: The lowest layer that has one.
    """

    def __init__(self, scene: Scene, first: int) -> None:
        self._layers = list(scene.decoder)[first:]
        texts = [prompt.text for prompt in scene.data.harmful.prompts + scene.data.harmless]
        harmful = np.arange(len(texts)) < len(scene.data.harmful.prompts)
        probes = [_probe(states.numpy(), harmful, scene.run.recipe) for states in self._last_states(scene, texts)]
        used = sorted(int((weights != 0).sum()) for weights, _ in probes)
        scene.run.decide("probes", "", f"{used[0]} to {used[-1]} of {len(probes[0][0])} directions of each layer")
        device = scene.run.model.device
        self._weights = [torch.from_numpy(weights).to(device) for weights, _ in probes]
        self._biases = [bias for _, bias in probes]

    @torch.no_grad()
    def _last_states(self, scene: Scene, texts: Sequence[str]) -> list[torch.Tensor]:
        """float32 [prompts, width] of each layer, at the last token of the prompt."""
        rows, run = scene.run.runtime.token_ids(texts), scene.run
        found = [torch.empty(len(rows), run.model.get_input_embeddings().weight.shape[-1]) for _ in self._layers]
        for places in by_length(rows, run.recipe.probe_batch):
            padded = pad_left([rows[i] for i in places], run.pad)
            ids, mask = (torch.from_numpy(part).to(run.model.device) for part in padded)
            with watched(self._layers) as seen:
                run.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            for states, hidden in zip(found, seen, strict=True):
                states[places] = hidden[:, -1].float().cpu()
        return found

    def __call__(self, trunk: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
        """The probes' loss of harmful prompts, a mean over layers and prompts, and `batch_loss` of harmless ones."""
        harmless = batch_loss(trunk, recipe, dataclasses.replace(batch, harmful=()))
        pairs = [example.tokens for example in batch.harmful]
        with watched(self._layers) as seen:
            trunk.logits(pairs)
        rows, last = torch.arange(len(pairs)), torch.tensor([len(pair.prompt) - 1 for pair in pairs])
        states = [hidden[rows, last].float() for hidden in seen]
        scores = [state @ w + b for state, w, b in zip(states, self._weights, self._biases, strict=True)]
        return harmless + softplus(-torch.stack(scores)).mean()


def _probe(states: np.ndarray, harmful: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, float]:
    """(float32 [width], bias) of a sparse logistic regression, for states that are not standardised."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=_SPARSITY, l1_ratio=1.0, solver="liblinear", class_weight="balanced", random_state=recipe.seed)
    probe.fit(standardise(states), harmful)
    weights = probe.coef_[0] / np.maximum(states.std(0, dtype=np.float64), 1e-8)
    return weights.astype(np.float32), float(probe.intercept_[0] - states.mean(0, dtype=np.float64) @ weights)


def _probe_loss(scene: Scene) -> Attempt:
    return dataclasses.replace(attempt(scene, scene.layers()), loss=ProbeLoss(scene, scene.first_layer))


METHODS = (Method("probe-loss", "Q-realign's probe loss instead of refusal texts", _probe_loss),)
