"""How far a tuning is, so that it can go on after an interruption exactly as it would have without one.

The order of the batches is not stored: it follows from the seed, and the batches that were done are drawn again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nestpatch.nest_train._run_dir import RunDir

_NAME = "tuning"
_SAVE_EVERY = 120.0
"""Seconds between two times at which the state is stored, beside the looks."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter, beside the number of its steps."""


_SHARES = ("attack_success", "refusal_benign", "refusal_lookalike")


@dataclass(frozen=True)
class Look:
    """What the held-out prompts showed at one step."""

    step: int
    loss: float
    attack_success: float | None = None
    """Share of harmful prompts that were answered; None where no answers were generated, as for the next two."""
    refusal_benign: float | None = None
    refusal_lookalike: float | None = None
    """None also where there are no look-alikes."""
    prompts: int = 0
    """Prompts of each kind that were answered, at most."""

    @property
    def _shares(self) -> list[float]:
        return [share for name in _SHARES if (share := getattr(self, name)) is not None]

    @property
    def score(self) -> tuple[float, float]:
        """Smaller is better: answered harmful and refused harmless prompts count alike; the loss decides between equals."""
        if not math.isfinite(self.loss):
            return math.inf, math.inf
        return sum(self._shares), self.loss

    @property
    def error(self) -> float:
        """The standard error of the sum of the shares."""
        return math.sqrt(sum(share * (1 - share) for share in self._shares) / max(1, self.prompts))

    def better(self, kept: Look, best: Look) -> bool:
        """Whether this look is to be kept instead of an earlier one.

        A few dozen answers differ by chance, so the loss decides between looks whose sums of shares are within a standard
        error of the smallest one (the rule of Breiman et al., Classification and Regression Trees, 1984).

        Args:
            kept: The look that is kept until now.
            best: The look with the smallest score, this one included.
        """
        limit = best.score[0] + best.error
        return kept.score[0] > limit or (self.score[0] <= limit and (self.loss, self.score) < (kept.loss, kept.score))

    @property
    def scalars(self) -> dict[str, float]:
        """What was measured, by the names of curves."""
        values = dataclasses.asdict(self)
        hidden = ("step", "prompts")
        return {f"held_out/{name}": value for name, value in values.items() if name not in hidden and value is not None}

    def as_json(self) -> dict[str, float | int | None]:
        """The numbers, rounded; those that are not finite, which a manifest cannot store, are None."""
        values = {"loss": self.loss, "attack_success": self.attack_success}
        values |= {"refusal_benign": self.refusal_benign, "refusal_lookalike": self.refusal_lookalike}
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        return {"step": self.step, **{name: round(known[name], 4) if name in known else None for name in values}}

    def __str__(self) -> str:
        text = f"held-out loss {self.loss:.3f}"
        if self.attack_success is None:
            return text
        kinds = (("benign", self.refusal_benign), ("look-alike", self.refusal_lookalike))
        refusals = ", ".join(f"{share:.0%} {kind}" for kind, share in kinds if share is not None)
        return f"{text}, attack success {self.attack_success:.0%}, refusals {refusals}"


@dataclass(frozen=True)
class TuneResult:
    """How the tuning went."""

    steps: int
    """Steps that were done."""
    before: Look
    """The base; step 0."""
    kept: Look
    """The step whose deltas were kept; that of the base where none was better."""
    looks: tuple[Look, ...]
    """All of them, in the order of the steps."""
    reason: str
    """Why the tuning stopped."""


class Trainable(Protocol):
    """What `tune` trains: the deltas of a `DeltaSet`, or another small change of a frozen model to compare them with."""

    first_layer: int
    """The lowest layer that it changes."""

    @property
    def device(self) -> torch.device:
        """Where the trained values are."""
        ...

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        ...

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer, each with its largest step as "peak".

        Args:
            learning_rate: The recipe's.
        """
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Inside, the model has the change."""
        ...

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all trained values."""
        ...

    def restore(self, deltas: Sequence[torch.Tensor]) -> None:
        """Sets the trained values to what `snapshot` returned."""
        ...

    def round_rows(self) -> None:
        """Called after every step."""
        ...


class TuneState:
    """What a tuning remembers between two steps.

    Args:
        run_dir: Where it is stored; by default nowhere.
        inputs: What the tuning depends on: `RunDir.rows`.

    Attributes:
        step: The last step that was done.
        looks: What the held-out prompts showed, in the order of the steps.
        stale: Looks since the best one.
        losses: The loss of every step.
        reason: Why the tuning ended; empty until then.
        decisions: Choice -> what was chosen before the first step, and why.
        micro_batch: Examples that are computed at once; 0 before the first look.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    def __init__(self, run_dir: RunDir | None = None, inputs: Mapping[str, Any] | None = None) -> None:
        self._run_dir, self._inputs = run_dir or RunDir(), inputs or {}
        self._saved_at = time.monotonic()
        self._tokens, self._seconds = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        """Before the first look."""
        self.step = self.stale = 0
        self.looks: list[Look] = []
        self.losses: list[float] = []
        self.reason = ""
        self.decisions: dict[str, str] = {}
        self.micro_batch, self.checkpointing = 0, False
        self._best = 0
        self._kept: list[torch.Tensor] = []
        self._stored: dict[str, torch.Tensor] = {}

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the examples in the steps of this process, per second of these steps."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def result(self) -> TuneResult:
        """How the tuning went until now."""
        return TuneResult(self.step, self.looks[0], self.looks[self._best], tuple(self.looks), self.reason)

    def load(self, change: Trainable, steps: int) -> bool:
        """Reads what an interrupted process stored.

        Args:
            change: What is trained; its values are not changed.
            steps: Steps of the recipe.

        Returns:
            Whether there was a state of this tuning.
        """
        like = change.snapshot()
        found = self._run_dir.tensors(_NAME, self._inputs, 4 * sum(16 + 4 * tensor.numel() for tensor in like))
        if found is None:
            return False
        facts, stored = found
        try:
            self._read(facts, steps)
            _check(stored, like, optimizer=self.step > 0)
        except (ValueError, TypeError, LookupError) as error:
            self._run_dir.note_damaged(_NAME, error)
            self._reset()
            return False
        self._stored, self._kept = stored, [stored[f"kept.{place}"].to(change.device) for place in range(len(like))]
        self._run_dir.note_reused(f"{self.step} of {steps} tuning steps")
        return True

    def enter(self, change: Trainable, optimizer: Any) -> bool:
        """Sets what is trained and its optimizer to the state that `load` found.

        Args:
            change: What is trained.
            optimizer: An AdamW that has done no step.

        Returns:
            Whether there was one; otherwise nothing is changed.
        """
        if not self.looks:
            return False
        count = len(self._kept)
        change.restore([self._stored[f"now.{place}"] for place in range(count)])
        if self.step:
            state = {place: {name: self._stored[f"{name}.{place}"] for name in (*_MOMENTS, "step")} for place in range(count)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return True

    def stepped(self, loss: float, tokens: int, seconds: float) -> None:
        """Counts a step.

        Args:
            loss: Its loss.
            tokens: Tokens of its examples.
            seconds: How long it took.
        """
        self.step += 1
        self.losses.append(loss)
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds

    def looked(self, look: Look, change: Trainable) -> None:
        """Remembers a look, and the values of the best one until now.

        Args:
            look: What the held-out prompts showed.
            change: What is trained.
        """
        self.looks.append(look)
        best = min(self.looks, key=lambda one: one.score)
        if len(self.looks) == 1 or look.better(self.looks[self._best], best):
            self._best, self._kept, self.stale = len(self.looks) - 1, change.snapshot(), 0
        else:
            self.stale += 1

    def keep_best(self, change: Trainable) -> None:
        """Sets what is trained to its values at the best look.

        Args:
            change: What is trained.
        """
        change.restore(self._kept)

    def save(self, change: Trainable, optimizer: Any, *, now: bool) -> None:
        """Stores the state.

        Args:
            change: What is trained.
            optimizer: Its AdamW.
            now: Whether to store it in any case; otherwise only where the last time is minutes ago.
        """
        if self._run_dir.folder is None or not (now or time.monotonic() - self._saved_at > _SAVE_EVERY):
            return
        tensors = {f"now.{place}": value for place, value in enumerate(change.snapshot())}
        tensors |= {f"kept.{place}": value for place, value in enumerate(self._kept)}
        for place, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{place}": moments[name] for name in (*_MOMENTS, "step")}
        self._run_dir.keep_tensors(_NAME, self._inputs, self._facts(), tensors)
        self._run_dir.record.update({"tokens_per_second": round(self.tokens_per_second, 1)}, tuning=self.as_json())
        self._saved_at = time.monotonic()

    def as_json(self) -> dict[str, Any]:
        """What the record of the run tells of the tuning."""
        return {
            "step": self.step,
            "losses": [round(loss, 6) for loss in self.losses],
            "looks": [look.as_json() for look in self.looks],
            "stopped": self.reason or None,
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "stale": self.stale,
            "best": self._best,
            "losses": self.losses,
            "looks": [dataclasses.asdict(look) for look in self.looks],
            "reason": self.reason,
            "decisions": self.decisions,
            "micro_batch": self.micro_batch,
            "checkpointing": self.checkpointing,
        }

    def _read(self, facts: Any, steps: int) -> None:
        """Takes over `_facts`; raises ValueError, TypeError or LookupError for anything else."""
        self.step, self.stale, self._best = (int(facts[name]) for name in ("step", "stale", "best"))
        self.losses = [float(loss) for loss in facts["losses"]]
        self.looks = [_look(entry) for entry in facts["looks"]]
        self.reason = str(facts["reason"])
        self.decisions = {str(name): str(choice) for name, choice in dict(facts["decisions"]).items()}
        self.micro_batch, self.checkpointing = int(facts["micro_batch"]), facts["checkpointing"] is True
        if not (
            0 <= self.step <= steps
            and self.micro_batch > 0
            and len(self.losses) == self.step
            and 0 <= self._best < len(self.looks)
        ):
            raise ValueError("its numbers contradict each other")


def _look(entry: Any) -> Look:
    known = {name: None if entry[name] is None else float(entry[name]) for name in _SHARES}
    return Look(int(entry["step"]), float(entry["loss"]), **known, prompts=int(entry["prompts"]))


def _check(stored: Mapping[str, torch.Tensor], like: Sequence[torch.Tensor], *, optimizer: bool) -> None:
    """Raises ValueError or LookupError for tensors that a tuning of these values does not have."""
    names = ["now", "kept", *(_MOMENTS if optimizer else ())]
    for place, value in enumerate(like):
        found = [stored[f"{name}.{place}"] for name in names]
        if any(tensor.shape != value.shape or tensor.dtype != value.dtype or not tensor.isfinite().all() for tensor in found):
            raise ValueError(f"the values of matrix {place} do not fit")
        if optimizer and stored[f"step.{place}"].shape != ():
            raise ValueError(f"the steps of matrix {place} are no number")
