"""`GuardCallback`: a guard for the Trainer of transformers, and for the trainers that are made of it, such as those of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from nestpatch.errors import DataError
from nestpatch.guarding.file import read
from nestpatch.guarding.guard import Guard
from nestpatch.guarding.holding import GuardedModel, guard_model


class GuardCallback(TrainerCallback):
    """Keeps a fine-tune to a guard: `Trainer(..., callbacks=[GuardCallback("guard.safetensors")])`.

    When the training begins, the model is compared with the guard; after each step of the optimizer, what the guard protects is
    restored. See `guard_model` for what that means.

    Args:
        guard: A guard, or its file.

    Raises:
        GuardFormatError: The file is not a guard.
    """

    def __init__(self, guard: str | Path | Guard) -> None:
        self.guard = guard if isinstance(guard, Guard) else read(guard)
        self._model: GuardedModel | None = None

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Compares the model with the guard. Raises GuardMismatchError, UnsupportedModelError."""
        self._model = guard_model(model, self.guard)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Restores what the guard protects."""
        if self._model is None:
            raise DataError("the trainer took a step before it began", advice="Use the Trainer of transformers.")
        self._model.project()
