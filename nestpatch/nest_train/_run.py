"""One loaded base model, and the record of every automatic choice: what the stages of a training share.

All use of the transformers runtime by the stages goes through here. Torch is imported inside functions, so that `train` can
report a missing package by the name of its extra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import DataError
from nestpatch.evaluation.drift import drift
from nestpatch.events import Event, OnEvent
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._digests import base_digest
from nestpatch.nest_train._record import versions
from nestpatch.nest_train._run_dir import RunDir
from nestpatch.nest_train._shard import base_bytes, choose_shard, require_processes
from nestpatch.nest_train.recipe import Recipe
from nestpatch.packing import require_packable
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.devices import pick_device, pick_dtype
from nestpatch.runtimes.loading import ModelLocation, load_model, locate
from nestpatch.runtimes.sharded import held_bytes, is_sharded
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.text import by_length
from nestpatch.runtimes.threads import wait_passively
from nestpatch.runtimes.transformers import TransformersRuntime
from nestpatch.runtimes.weights import MlpBlock, experts_left_alone, find_mlps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Limits the threads of torch, scikit-learn and BLAS while it is entered.

    Args:
        threads: Threads, at least 1; None leaves the libraries as they are.

    Raises:
        DataError: The number is less than 1.
    """
    wait_passively()
    if threads is None:
        yield
        return
    if threads < 1:
        raise DataError(f"threads must be at least 1, got {threads}")
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def choose_attention(model: PreTrainedModel) -> tuple[str, str]:
    """Chooses how attention is computed, and sets it in the model.

    Args:
        model: A loaded model.

    Returns:
        (name in transformers, reason).
    """
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
        return "eager", "PyTorch's fused attention has a slow backward pass on CPUs"
    chosen = str(model.config._attn_implementation)
    reasons = {"sdpa": "PyTorch's fused attention", "eager": "this architecture has no fused attention"}
    return chosen, reasons.get(chosen, "asked for by the model")


@dataclass(eq=False)
class Run:
    """One loaded base model, the recipe, and the reasons of the choices made so far."""

    source: ModelLocation
    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    on_event: OnEvent
    run_dir: RunDir = field(default_factory=RunDir)
    decisions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, base: str | Path, recipe: Recipe, on_event: OnEvent, run_dir: RunDir | None = None) -> Run:
        """Finds and loads the base, and picks the device and the arithmetic.

        Args:
            base: A model directory, or a Hub id.
            recipe: `device`, `dtype`, `load_in` and `shard` are read.
            on_event: Called with the progress.
            run_dir: What the stages keep, and find; by default nothing.

        Returns:
            The run.

        Raises:
            CheckpointError: The base cannot be found, read or loaded.
            MissingExtraError: The recipe loads in few bits, and bitsandbytes is not installed.
            DataError: The recipe divides the base, and there is one process.
            OutOfMemoryError: There is one process, and its GPU has less memory than the base takes.
        """
        wait_passively()
        require_processes(recipe)
        with _ranks.one_after_the_first():
            source = locate(base)
            # Before minutes of loading: can a pack change these weights? This also ends an interrupted change.
            checkpoint, _ = open_model(source.path)
        device, device_reason = pick_device(recipe.device)
        run_dir = run_dir or RunDir()
        on_event(Event("load", note=source.model_id))
        _keep_apart(run_dir, checkpoint, source, device)

        def measured() -> tuple[str, str]:
            return pick_dtype(recipe.dtype, device, sum(file.stat().st_size for file in checkpoint.files))

        # It may be measured, and must then be what it was before an interruption.
        dtype, dtype_reason = run_dir.value("dtype", {"dtype": recipe.dtype}, measured, _choice)
        run_dir.context |= {"dtype": dtype, "load_in": recipe.load_in}
        own, count = _ranks.own_device(device), _ranks.HERE.count
        shard, shard_reason = _shard(recipe, run_dir, own, base_bytes(checkpoint, dtype))
        loaded = load_model(source.path, own, dtype, recipe.load_in, count if shard == "on" else 1)
        run_dir.record.update({"parameter_bytes": held_bytes(loaded[0])})
        run = cls(source, checkpoint, *loaded, recipe, on_event, run_dir)
        run.decide("device", device, device_reason)
        if count > 1:
            run.decide("processes", str(count), "started by the launcher")
            run.decide("shard", shard, shard_reason)
        run.decide("dtype", dtype, dtype_reason)
        if recipe.load_in != "none":
            run.decide("load_in", recipe.load_in, "asked for; what is measured is the pack on the model in this form")
        run.decide("attention", *choose_attention(run.model))
        return run

    @property
    def pad(self) -> int:
        """The id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    def blocks(self) -> tuple[MlpBlock, ...]:
        """Finds the feed-forward blocks, and checks that a pack can change them: before minutes of work.

        Returns:
            The blocks in the order of the layers.

        Raises:
            UnsupportedModelError: The architecture has none that this package knows, or the file stores their rows in another
                order.
            CheckpointFormatError: transformers changed their weights while loading.
            QuantizationError: The base's file stores them in a type that no pack can change on this machine.
        """
        blocks = find_mlps(self.model)
        for name in (projection.weight_name for block in blocks for projection in block.projections):
            tensors = self.stored.tensors(name)
            for _, tensor in tensors:
                require_packable(self.checkpoint, tensor)
            self.stored.require_same(name, np.asarray([0, tensors[-1][0].start + tensors[-1][0].rows - 1]))
        for reason in experts_left_alone(self.model):
            self.decide("experts left alone", "", reason)
        return blocks

    @cached_property
    def stored(self) -> StoredWeights:
        """The base's weights on disk."""
        return StoredWeights(self.model, self.checkpoint)

    @property
    def runtime(self) -> TransformersRuntime:
        """The model, with the recipe's limits."""
        return TransformersRuntime(self.model, self.tokenizer, self.recipe.max_answer_tokens, self.recipe.max_prompt_tokens)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return int(self.model.num_parameters())  # of a quantized model too

    def decide(self, what: str, value: str, reason: str) -> None:
        """Records an automatic choice, which goes into the pack, and reports it.

        Args:
            what: What was chosen, such as "device".
            value: The choice; empty where the reason says it.
            reason: Why this choice.
        """
        self.decisions[what] = f"{value} ({reason})" if value else reason
        self.note(f"{what}: {self.decisions[what]}")

    def note(self, text: str) -> None:
        """Reports one line for people.

        Args:
            text: The line.
        """
        self.on_event(Event("note", note=text))

    def generate(
        self,
        prompts: Sequence[str],
        stage: str,
        note: str = "",
        tokens: int | None = None,
        keep: str = "",
        inputs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Greedy answers to the prompts, in the same order.

        Args:
            prompts: The texts.
            stage: The stage that the progress is reported for.
            note: Added to the progress.
            tokens: Length of an answer; None for the recipe's `max_answer_tokens`.
            keep: The record of the run directory in which the answers are kept and found; empty keeps none.
            inputs: What these answers depend on beside the base and their length.

        Returns:
            One answer per prompt.
        """

        def report(event: Event) -> None:
            self.on_event(Event(stage, event.done, event.total, note))

        runtime = self.runtime if tokens is None else replace(self.runtime, max_new_tokens=tokens)
        length = {"tokens": runtime.max_new_tokens, "prompt tokens": runtime.max_prompt_tokens}
        return _answers(self.run_dir, keep, {**length, **(inputs or {})}, runtime, prompts, report)

    def drift(self, answers: Mapping[str, str], off: Callable[[], AbstractContextManager[None]]) -> float | None:
        """How far the model with attached deltas has moved from the base.

        Args:
            answers: Prompt -> the base's answer.
            off: Disables the deltas while it is entered.

        Returns:
            Mean KL(base || model) in nats per answer token; None without answers.
        """
        return drift(replace(self.runtime, active=off), self.runtime, answers)


def _answers(
    run_dir: RunDir, name: str, inputs: Mapping[str, Any], runtime: TransformersRuntime, prompts: Sequence[str], report: OnEvent
) -> list[str]:
    """Answers of a record, and new ones where it has none. A batch of every rank is recorded when it is done.

    Without a name nothing is found or recorded.
    """
    known = dict(run_dir.rows(name, inputs, _answer)) if name else {}
    if reused := sum(prompt in known for prompt in prompts):
        run_dir.note_reused(f"{reused} of {len(prompts)} {name.replace('-', ' ')}")
    # The batches of `runtime.generate`: the same prompts run together, whether or not some of the batches were done before.
    for places, done in _ranks.rounds(by_length(runtime.token_ids(prompts), runtime.together)):
        missing, answers = [prompts[place] for place in places if prompts[place] not in known], {}
        if not is_sharded(runtime.model) or any(_ranks.gathered(bool(missing))):
            answers = dict(zip(missing, _generated(runtime, missing, prompts), strict=True))
        before = len(known)
        for new in _ranks.gathered(answers):
            known = {**new, **known}
        if name and len(known) > before:
            run_dir.keep_rows(name, inputs, [{"prompt": prompt, "answer": answer} for prompt, answer in known.items()])
        report(Event("generate", done, len(prompts)))
    return [known[prompt] for prompt in prompts]


def _generated(runtime: TransformersRuntime, missing: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The answers to one batch, which may be empty. Where the model is divided, a rank without a prompt answers another one in
    step with the others; transformers keeps the ranks in step within a batch (`synced_gpus`).
    """
    if missing or not is_sharded(runtime.model):
        return runtime.generate(missing) if missing else []
    runtime.generate(prompts[:1])
    return []


def _answer(row: Any) -> tuple[str, str]:
    prompt, answer = row["prompt"], row["answer"]
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise TypeError("it is no prompt with an answer")
    return prompt, answer


def _keep_apart(run_dir: RunDir, checkpoint: Checkpoint, source: ModelLocation, device: str) -> None:
    """Tells a run directory by the base and the arithmetic what it must not mix."""
    if run_dir.folder is None:
        return
    used = versions()
    arithmetic = {name: used[name] for name in ("nestpatch", "torch", "transformers")}
    run_dir.context |= {
        "base": base_digest(checkpoint, source.path),
        "device": device.partition(":")[0],
        **arithmetic,
    }


def _shard(recipe: Recipe, run_dir: RunDir, device: str, nbytes: int) -> tuple[str, str]:
    """`choose_shard` of the first process, which a training that goes on finds again."""

    def chosen() -> tuple[str, str]:
        return choose_shard(recipe, device, nbytes)

    inputs = {"shard": recipe.shard, "processes": _ranks.HERE.count}
    return chosen() if _ranks.HERE.count == 1 else run_dir.value("shard", inputs, chosen, _sharding)


def _sharding(row: Any) -> tuple[str, str]:
    shard, reason = row
    if shard not in ("on", "off") or not isinstance(reason, str):
        raise ValueError("it says not whether the base is divided")
    return shard, reason


def _choice(row: Any) -> tuple[str, str]:
    dtype, reason = row
    if dtype not in ("float32", "bfloat16", "float16") or not isinstance(reason, str):
        raise ValueError("it is no type of numbers")
    return dtype, reason
