"""The stage tune: trains the deltas and nothing else. Source: NeST (arXiv 2602.16835), section on tuning."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from nestpatch.errors import PromptDataError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train._neurons import Clusters
from nestpatch.nest_train._targets import Halves
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.text import collate
from nestpatch.runtimes.transformers import answer_logits
from nestpatch.runtimes.weights import MlpBlock, Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")


@dataclass(frozen=True)
class TuneResult:
    """How the tuning went."""

    steps: int
    """Steps that were done."""
    best_step: int
    """The step whose deltas were kept; 0 where no step lowered the held-out loss."""
    loss_before: float
    """Held-out loss of the base."""
    loss_after: float
    """Held-out loss of the deltas that were kept."""
    reason: str
    """Why the tuning stopped."""


def tune(
    model: PreTrainedModel, deltas: DeltaSet, data: Halves, pad: int, recipe: Recipe, on_event: OnEvent = ignore
) -> TuneResult:
    """Trains the deltas, stops early on the held-out loss, and leaves the best deltas in place.

    Each half of a batch has its own mean loss over answer tokens, so that long answers do not outweigh short refusals.

    Args:
        model: The frozen base.
        deltas: The deltas, changed in place.
        data: The training pairs; a share of them is held out.
        pad: The id of the padding token.
        recipe: The settings of the stage, and the seed.
        on_event: Called with the loss after every step.

    Returns:
        How many steps were done, and the held-out losses.

    Raises:
        PromptDataError: A half has fewer than two pairs.
    """
    from accelerate import Accelerator

    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    harmful, harmful_held = split_off(data.harmful, recipe.tune_holdout, rng)
    benign, benign_held = split_off(data.benign, recipe.tune_holdout, rng)
    held_out = Halves(harmful_held, benign_held)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    optimizer = accelerator.prepare(_optimizer(deltas, recipe))
    parameters = [module.delta for module in deltas.modules]
    batches = zip(endless(harmful, recipe.batch, rng), endless(benign, recipe.batch, rng), strict=True)
    with deltas.attached():
        best = before = _held_out_loss(model, deltas, held_out, pad, recipe)
        kept, best_step, stale, reason = deltas.snapshot(), 0, 0, f"all {recipe.steps} steps done"
        for step, (bad, good) in enumerate(batches, start=1):
            _schedule(optimizer, step, recipe)
            loss = _loss(model, deltas, Halves(bad, good), pad, recipe)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            on_event(Event("tune", step, recipe.steps, f"loss {loss.item():.4f}"))
            if step % recipe.eval_every == 0 or step == recipe.steps:
                now = _held_out_loss(model, deltas, held_out, pad, recipe)
                on_event(Event("tune", step, recipe.steps, f"loss {loss.item():.4f}, held-out {now:.4f}"))
                if now < best:
                    best, kept, best_step, stale = now, deltas.snapshot(), step, 0
                else:
                    stale += 1
                if stale >= recipe.patience and step < recipe.steps:
                    reason = f"no better held-out loss in {stale * recipe.eval_every} steps"
                    break
            if step == recipe.steps:
                break
    deltas.restore(kept)
    return TuneResult(step, best_step, before, best, reason)


def _optimizer(deltas: DeltaSet, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with one group per delta, whose step is relative to the RMS of the matrix that it changes."""
    groups = []
    for module in deltas.modules:
        rms = module.base.weight.detach().float().square().mean().sqrt().item()
        groups.append({"params": [module.delta], "rms": rms, "lr": recipe.learning_rate * rms})
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)


def _schedule(optimizer: Any, step: int, recipe: Recipe) -> None:
    """Linear warm-up, then a cosine to zero."""
    progress = (step - 1) / recipe.steps
    warm = min(1.0, step / max(1.0, recipe.warmup * recipe.steps))
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * group["rms"] * warm * 0.5 * (1 + math.cos(math.pi * progress))


def _loss(model: PreTrainedModel, deltas: DeltaSet, data: Halves, pad: int, recipe: Recipe) -> torch.Tensor:
    """Refusal loss, plus the weighted loss and drift on benign answers, of one batch."""
    refusal_logits, refusal_labels = answer_logits(model, collate(data.harmful, pad, model.device))
    loss = cross_entropy(refusal_logits, refusal_labels)
    benign = collate(data.benign, pad, model.device)
    logits, labels = answer_logits(model, benign)
    loss = loss + recipe.benign_weight * cross_entropy(logits, labels)
    if recipe.kl_weight:
        with deltas.off(), torch.no_grad():
            base_logits, _ = answer_logits(model, benign)
        drift = kl_div(log_softmax(logits, -1), log_softmax(base_logits, -1), reduction="batchmean", log_target=True)
        loss = loss + recipe.kl_weight * drift
    return loss


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, deltas: DeltaSet, data: Halves, pad: int, recipe: Recipe) -> float:
    """The training loss over all held-out pairs, in batches, weighted by their size."""
    total, weight = 0.0, 0
    size = max(len(data.harmful), len(data.benign))
    for start in range(0, size, recipe.batch):
        # The shorter half repeats, so that every batch has both.
        take = range(start, min(start + recipe.batch, size))
        batch = Halves([data.harmful[i % len(data.harmful)] for i in take], [data.benign[i % len(data.benign)] for i in take])
        total += _loss(model, deltas, batch, pad, recipe).item() * len(take)
        weight += len(take)
    return total / weight


class ClusterDelta(nn.Module):
    """A frozen Linear plus shared deltas on some of its rows. `delta`, float32 [clusters, in], starts at zero.

    Args:
        base: The Linear.
        rows: The rows that change, int64 [rows].
        cluster: Which delta each row gets, int64 [rows].
        clusters: Number of deltas.
    """

    def __init__(self, base: nn.Linear, rows: torch.Tensor, cluster: torch.Tensor, clusters: int) -> None:
        super().__init__()
        self.base = base
        self.membership: torch.Tensor
        self.rows: torch.Tensor
        self.cluster: torch.Tensor
        self.enabled = True
        device = base.weight.device
        self.delta = nn.Parameter(torch.zeros(clusters, base.in_features, device=device))
        # [out, clusters], a few columns: spreading by a product is exact for 0/1, fast, and deterministic on a GPU.
        membership = torch.zeros(base.out_features, clusters, dtype=base.weight.dtype, device=device)
        membership[rows, cluster] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cluster", cluster, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        y: torch.Tensor = self.base(x)
        if not self.enabled:
            return y
        return y + linear(linear(x, self.delta.to(x.dtype)), self.membership)


class DeltaSet:
    """All deltas of a model, attached and detached together.

    Args:
        blocks: The model's feed-forward blocks.
        clusters: The groups of neurons of each block; blocks without a group get no delta.
    """

    def __init__(self, blocks: Sequence[MlpBlock], clusters: Sequence[Clusters]) -> None:
        self.places: list[tuple[Projection, ClusterDelta]] = []
        for block, group in zip(blocks, clusters, strict=True):
            if group.k:
                self.places += [(p, _delta(p, block.neurons, group)) for p in block.projections]

    @property
    def modules(self) -> list[ClusterDelta]:
        """The modules that hold the deltas, in the order of `places`."""
        return [delta for _, delta in self.places]

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(module.delta.numel() for module in self.modules)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the deltas replace their Linears; afterwards the model is as before."""
        for projection, module in self.places:
            setattr(projection.parent, projection.attribute, module)
        try:
            yield
        finally:
            for projection, module in self.places:
                setattr(projection.parent, projection.attribute, module.base)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the attached deltas are disabled: the model answers as the base."""
        for module in self.modules:
            module.enabled = False
        try:
            yield
        finally:
            for module in self.modules:
                module.enabled = True

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all deltas."""
        return [module.delta.detach().clone() for module in self.modules]

    @torch.no_grad()
    def restore(self, deltas: Sequence[torch.Tensor]) -> None:
        """Sets all deltas to copies that `snapshot` returned."""
        for module, delta in zip(self.modules, deltas, strict=True):
            module.delta.copy_(delta)

    def round_to(self, dtype: str) -> None:
        """Rounds the deltas to their storage dtype ("F32", "BF16" or "F16"), so that what is evaluated is what ships."""
        kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        self.restore([delta.to(kind).float() for delta in self.snapshot()])


def _delta(projection: Projection, neurons: int, group: Clusters) -> ClusterDelta:
    """The module for a projection; each stacked part (gate, up) of a fused projection has its own deltas."""
    base = projection.linear
    rows = np.concatenate([group.neurons + part * neurons for part in range(projection.parts)])
    labels = np.concatenate([group.labels + part * group.k for part in range(projection.parts)])
    device = base.weight.device
    return ClusterDelta(
        base, torch.from_numpy(rows).to(device), torch.from_numpy(labels).to(device), group.k * projection.parts
    )


def split_off(items: Sequence[_T], share: float, rng: random.Random) -> tuple[list[_T], list[_T]]:
    """Holds out a random share of the items.

    Args:
        items: What to split.
        share: Between 0 and 1; at least one item is held out.
        rng: Decides which.

    Returns:
        (kept, held out).

    Raises:
        PromptDataError: There are fewer than two items.
    """
    if len(items) < 2:
        raise PromptDataError(f"{len(items)} prompts are too few: some must be held out to decide when to stop")
    order = rng.sample(list(items), len(items))
    held_out = max(1, round(len(items) * share))
    return order[held_out:], order[:held_out]


def endless(items: Sequence[_T], size: int, rng: random.Random) -> Iterator[list[_T]]:
    """Batches without end; every item is seen once before any is seen again.

    Args:
        items: What to draw from.
        size: Items of a batch.
        rng: Decides the order.

    Yields:
        The next batch.
    """
    queue: list[_T] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(list(items), len(items))
        batch, queue = queue[:size], queue[size:]
        yield batch
