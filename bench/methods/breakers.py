"""Circuit breakers, by representation rerouting (arXiv 2406.04313; code GraySwanAI/circuit-breakers).

The hidden states of harmful answers are turned away from the base's, those of all other texts are kept. There are no refusals
to learn: the harmful texts are the base's own answers, and what the base refuses already is kept. What a rerouted model says is
often no language, which a look would count as answers: the similarity alone chooses the step, which is nearly always the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import cosine_similarity

from bench.methods._scene import Attempt, Method, Scene, watched
from bench.methods.lora import LoraSet, linears
from nestpatch.evaluation.judges import is_refusal
from nestpatch.nest_train._targets import Examples, encode_examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.text import collate

_ALPHA = 10.0
"""Of both parts of the loss together, as for Llama 3 8B."""
_TARGETS = (10 / 32, 20 / 32)
"""The layers that are rerouted, as parts of the depth; adapters end at the last of them."""
_RATE = 1e-4
_ANSWER_TOKENS = 24
"""Of a harmful answer: as many as other methods train of a refusal."""


class Breakers(LoraSet):
    """Adapters on the layers up to the last target, with the loss that reroutes.

    Args:
        scene: The base.
        kept: Harmful prompts whose answers, refusals, are kept.
    """

    def __init__(self, scene: Scene, kept: frozenset[str]) -> None:
        depth = len(scene.decoder)
        self._targets = sorted({max(0, round(part * depth) - 1) for part in _TARGETS})
        self._scene, self._kept, self._step = scene, kept, 0
        names = linears(scene, scene.decoder[: self._targets[-1] + 1])
        super().__init__(scene.run.model, names, 0, rank=16, alpha=16, rate=_RATE)

    def round_rows(self) -> None:
        """Counts the steps, on which the loss depends."""
        self._step += 1

    def loss(self, _: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
        """Similarity of rerouted hidden states to the base's, and the distance of the kept ones from it.

        The weight moves from the first part to the second: from (alpha, 0) to (alpha / 2, alpha / 2) at the last step. Of
        held-out prompts it is the similarity alone.
        """
        rerouted = [example.tokens for example in batch.harmful if example.text not in self._kept]
        kept = [example.tokens for example in batch.harmful if example.text in self._kept]
        run = self._scene.run
        ids, mask, _ = collate([*rerouted, *kept, *(e.tokens for e in batch.harmless)], run.pad, run.model.device)
        with torch.no_grad(), self.off():
            base = self._hidden(ids, mask)
        now = self._hidden(ids, mask)
        turned, real = mask[: len(rerouted)].bool(), mask[len(rerouted) :].bool()
        similar = [cosine_similarity(now[t][: len(rerouted)], base[t][: len(rerouted)], dim=-1)[turned] for t in self._targets]
        moved = [(ours - theirs)[len(rerouted) :][real].norm(dim=-1) for ours, theirs in zip(now, base, strict=True)]
        reroute = torch.cat(similar).relu().sum() / max(1, turned.sum() * len(similar))
        if not torch.is_grad_enabled():
            return reroute
        progress = self._step / (2 * recipe.steps)
        return _ALPHA * ((1 - progress) * reroute + progress * torch.cat(moved).mean())

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """float32 [batch, tokens, width] of each layer up to the last target; the layers above are not computed."""
        layers = self._scene.decoder
        with _shortened(layers, self._targets[-1] + 1), watched(layers) as seen:
            self._scene.run.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return [hidden.float() for hidden in seen]


@contextmanager
def _shortened(layers: torch.nn.ModuleList, count: int) -> Iterator[None]:
    """Inside, the model has its first layers alone."""
    above = list(layers[count:])
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(above)


def _breakers(scene: Scene) -> Attempt:
    prompts = [prompt.text for prompt in scene.data.harmful.prompts]
    answers = scene.run.generate(prompts, "distil", tokens=_ANSWER_TOKENS)
    pairs = list(zip(prompts, answers, strict=True))
    change = Breakers(scene, frozenset(prompt for prompt, answer in pairs if not answer or is_refusal(answer)))
    harmful = encode_examples(scene.run, pairs, refusals=True)
    return Attempt(change, dataclasses.replace(scene.examples, harmful=harmful), change.loss)


METHODS = (
    Method(
        "circuit-breakers",
        "circuit breakers: LoRA, r = 16, up to 5/8 of the layers, by representation rerouting",
        _breakers,
        {"check_prompts": 0},
    ),
)
