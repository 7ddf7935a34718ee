"""The two contenders of `bench.step`, and how they are measured."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import kl_div, log_softmax

from bench._peak import Peak
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._neurons import Clusters
from nestpatch.nest_train._run import choose_attention
from nestpatch.nest_train._targets import BUILT_IN, Example, Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import batch_loss, batches
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe, make_recipe
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.text import IGNORED, TokenPair, collate, encode_pairs
from nestpatch.runtimes.transformers import load_model, locate, pick_device, pick_dtype
from nestpatch.runtimes.weights import MlpBlock, find_mlps

_RANK = 8
_SHARE = 0.023
"""Neurons that a threshold of two standard deviations keeps."""
_REFUSAL_TOKENS, _FRAME, _LETTERS = 12, 20, 4
"""For random models: tokens of a refusal and of a chat template, and letters of a token."""
_LIKE_TRAINED = "Here is a short answer to what you have asked for, in plain words."
"""An answer of a harmless prompt; only its length matters."""


class Contender(Protocol):
    """Something that trains."""

    trained: int

    def step(self, batch: Examples) -> float:
        """One optimizer step; the loss."""
        ...


class Nest:
    """The deltas in the layers from the middle up, as `nestpatch train` trains them.

    Args:
        model: The frozen base.
        pad: The id of the padding token.
        recipe: The settings.
        data: All examples of the steps.
        checkpoint: The base on disk, whose rounding is trained through; None for a random model.
    """

    def __init__(self, model: Any, pad: int, recipe: Recipe, data: Sequence[Examples], checkpoint: Checkpoint | None) -> None:
        choose_attention(model)
        blocks, self.recipe = find_mlps(model), recipe
        self.deltas = DeltaSet(blocks, [_clusters(block, len(blocks) // 2, recipe.k_min) for block in blocks])
        if checkpoint is not None:
            self.deltas.quantize_like(StoredWeights(model, checkpoint))
        self.trained = self.deltas.trainable
        self.trunk = Trunk(model, blocks, self.deltas.first_layer, pad)
        self.trunk.checkpointing = recipe.checkpointing == "on"
        every = [example.tokens for batch in data for example in batch.harmful + batch.harmless]
        harmless = [example.tokens for batch in data for example in batch.harmless]
        began = time.perf_counter()
        self.trunk.remember(every, harmless, Path(mkdtemp()))
        self.seconds_per_example = (time.perf_counter() - began) / len(set(every))
        groups = self.deltas.groups(recipe.learning_rate)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=recipe.weight_decay)

    def step(self, batch: Examples) -> float:
        """As in `nestpatch.nest_train._tune.tune`."""
        self.optimizer.zero_grad()
        with self.deltas.attached():
            loss = batch_loss(self.trunk, self.recipe, batch, torch.Tensor.backward)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.deltas.round_rows()
        return loss.item()


def _clusters(block: MlpBlock, first: int, k: int) -> Clusters:
    """Random neurons, as many as a training keeps."""
    count = max(k, round(_SHARE * block.neurons))
    neurons = np.sort(np.random.default_rng(block.layer).choice(block.neurons, count, replace=False))
    return Clusters(block.layer, neurons, np.arange(count) % k, k if block.layer >= first else 0, None, "random")


class Lora:
    """LoRA by PEFT in all layers.

    Args:
        model: The frozen base.
        pad: The id of the padding token.
        recipe: `kl_weight` and `clip` are read.
    """

    def __init__(self, model: Any, pad: int, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        names = sorted({projection.attribute for block in find_mlps(model) for projection in block.projections})
        self.pad, self.recipe = pad, recipe
        self.model: Any = get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=names))
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, batch: Examples) -> float:
        """Cross entropy of the refusals by the model's own loss, and divergence from the model without adapters."""
        self.optimizer.zero_grad()
        pairs = [example.tokens for example in batch.harmful + batch.harmless]
        ids, mask, labels = collate(pairs, self.pad, self.model.device)
        border = len(batch.harmful)
        refusals = labels.clone()
        refusals[border:] = IGNORED
        out = self.model(input_ids=ids, attention_mask=mask, labels=refusals, use_cache=False)
        with torch.no_grad(), self.model.disable_adapter():
            base = self.model(input_ids=ids[border:], attention_mask=mask[border:], use_cache=False).logits
        wanted = labels[border:, 1:] != IGNORED
        new, old = (log_softmax(logits[:, :-1][wanted].float(), -1) for logits in (out.logits[border:], base))
        loss = out.loss + self.recipe.kl_weight * kl_div(new, old, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        return float(loss.item())


class Bench:
    """One base and its batches.

    Args:
        model: A model directory, a GGUF file or a Hub id; None for a random one.
        shape: The configuration of the random one.
        settings: Settings of the recipe, as "key=value".
    """

    def __init__(self, model: str | None, shape: dict[str, int] | None, settings: Sequence[str]) -> None:
        self.recipe = make_recipe(None, settings)
        self.shape, self.path = shape, None if model is None else locate(model).path
        self.checkpoint = None if self.path is None else open_model(self.path)[0]
        nbytes = sum(file.stat().st_size for file in self.checkpoint.files) if self.checkpoint else 1 << 30
        self.device, _ = pick_device(self.recipe.device)
        self.dtype, _ = pick_dtype(self.recipe.dtype, self.device, nbytes)
        self.tokenizer: Any = None
        self.data = TrainingData.builtin().sampled(self.recipe.max_prompts, 0)

    def load(self) -> Any:
        """The frozen base, the same at every call."""
        if self.path is not None:
            model, self.tokenizer = load_model(self.path, self.device, self.dtype, self.recipe.load_in)
            return model
        from transformers import LlamaConfig, LlamaForCausalLM

        assert self.shape is not None
        config = LlamaConfig(**self.shape, tie_word_embeddings=self.shape["hidden_size"] <= 2048, dtype=self.dtype)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, self.dtype))
        return model.eval().requires_grad_(False)

    @property
    def pad(self) -> int:
        """The id of the padding token."""
        return 0 if self.tokenizer is None else int(self.tokenizer.pad_token_id)

    def batches(self, count: int) -> list[Examples]:
        """The batches of the steps, the same in every process. The base has been loaded: its tokenizer is used."""
        rng, data = random.Random(0), self.data
        kinds = (data.harmful, data.benign, data.lookalike)
        made = [self._examples([p.text for p in kind.prompts], rng, refusals=kind is data.harmful) for kind in kinds if kind]
        return list(islice(batches(Examples(*made), self.recipe, rng), count))

    def _examples(self, texts: Sequence[str], rng: random.Random, *, refusals: bool) -> tuple[Example, ...]:
        length = _REFUSAL_TOKENS if refusals else self.recipe.trained_tokens
        if self.tokenizer is not None:
            answer = BUILT_IN[0] if refusals else _LIKE_TRAINED
            limits = (self.recipe.max_prompt_tokens, 2 * length)
            pairs = encode_pairs(self.tokenizer, [(text, answer) for text in texts], *limits)
        else:
            assert self.shape is not None

            def ids(tokens: int) -> tuple[int, ...]:
                return tuple(rng.randrange(3, self.shape["vocab_size"]) for _ in range(tokens))

            wanted = [min(_FRAME + len(text) // _LETTERS, self.recipe.max_prompt_tokens) for text in texts]
            pairs = [TokenPair(ids(tokens), ids(length)) for tokens in wanted]
        return tuple(Example(text, pair) for text, pair in zip(texts, pairs, strict=True))

    def contender(self, name: str, model: Any, data: Sequence[Examples]) -> Contender:
        """One of the two."""
        if name == "lora":
            return Lora(model, self.pad, self.recipe)
        return Nest(model, self.pad, self.recipe, data, self.checkpoint)

    def speed(self, warm_up: int, steps: int) -> dict[str, Any]:
        """Seconds of the steps of both, which alternate; each has its copy of the base."""
        models = {name: self.load() for name in ("nestpatch", "lora")}
        data = self.batches(warm_up + steps)
        sides = {name: self.contender(name, model, data) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for batch in data:
            for name, side in sides.items():
                began = self._now()
                side.step(batch)
                seconds[name].append(self._now() - began)
        prompts = len(self.data.harmful.prompts) + len(self.data.harmless)
        device = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        return {
            "base": f"Base in {self.dtype if self.recipe.load_in == 'none' else self.recipe.load_in} on {device}.",
            "tokens": [sum(one.length for one in batch.harmful + batch.harmless) for batch in data][warm_up:],
            "seconds": {name: times[warm_up:] for name, times in seconds.items()},
            "once_per_step": sides["nestpatch"].seconds_per_example * prompts / self.recipe.steps,
            "trained": {name: side.trained for name, side in sides.items()},
        }

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, name: str, steps: int) -> dict[str, float]:
        """Peak memory of the steps over what the base takes, in MB."""
        model = self.load()
        data = self.batches(steps)
        peak = Peak(torch.device(self.device))
        side = self.contender(name, model, data)
        for batch in data:
            side.step(batch)
        return {"extra_mb": peak.extra() / 1e6}
