"""Everything that nestpatch refuses, by who is at fault.

NestpatchError
├── PackError               the .nest file
│   ├── PackFormatError         its bytes or manifest break the format (docs/nest-format.md)
│   ├── PackTooNewError         it uses a newer version of the format
│   └── PackContentError        it parses, but its tensors make no sense together
├── CheckpointError         the model on disk
│   ├── CheckpointFormatError   broken or unsupported file
│   ├── BaseMismatchError       a sound model, but not the one that the pack was made for
│   └── UnsupportedModelError   an architecture without an MLP that we know
├── OutputError             the place that was to be written
├── DataError               prompt files and recipes
│   ├── PromptDataError         a prompt file is missing, empty or malformed
│   └── RecipeError             an unknown knob, or a value outside its range
├── TrainingError           the method found nothing to train, or the training failed
└── MissingExtraError       an optional package is not installed

Each error carries the reason in its message and the way out in `.advice`.
"""

from __future__ import annotations


class NestpatchError(Exception):
    """Base of everything that nestpatch raises on purpose. `str(e)` is the reason, `e.advice` the way out."""

    advice = "See the message above."

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason)
        if advice is not None:
            self.advice = advice


class PackError(NestpatchError):
    """Something is wrong with a pack."""

    advice = "Get the pack again from its publisher; do not repair it by hand."


class PackFormatError(PackError):
    """The bytes are no well-formed .nest file."""


class PackTooNewError(PackError):
    """The pack uses fields or a format version that this nestpatch does not know."""

    advice = "Upgrade nestpatch: pip install -U nestpatch"


class PackContentError(PackError):
    """A well-formed file whose tensors or facts contradict each other."""


class CheckpointError(NestpatchError):
    """Something is wrong with the model on disk."""

    advice = "Check the path, and that the download of the model is complete."


class CheckpointFormatError(CheckpointError):
    """The model file is broken, truncated or of an unsupported format."""


class BaseMismatchError(CheckpointError):
    """The model is sound, but it is not the base that the pack was made for."""

    advice = "Use the base that `nestpatch show PATCH` names. A fine-tuned copy of it needs its own pack: nestpatch train."


class UnsupportedModelError(CheckpointError):
    """The model has no feed-forward layers of a kind that nestpatch knows."""

    advice = "Supported: gate_proj/up_proj, fused gate_up_proj, and fc1/fc_in/c_fc/dense_h_to_4h made of Linear layers."


class OutputError(NestpatchError):
    """The output cannot be written."""

    advice = "Choose another place with -o; nothing was written."


class DataError(NestpatchError):
    """Something is wrong with what the user gave: prompts or settings."""

    advice = "Correct the input and run the command again."


class PromptDataError(DataError):
    """A prompt file is missing, empty or malformed."""

    advice = 'Give JSONL, CSV or Parquet with a "prompt" column, or a data set id of the Hugging Face Hub.'


class RecipeError(DataError):
    """A training setting is unknown or out of range."""

    advice = "`nestpatch train --help-recipe` lists every setting with its default and range."


class TrainingError(NestpatchError):
    """The stages of the method cannot go on."""

    advice = "Lower `threshold`, or give more and clearer prompts."


class MissingExtraError(NestpatchError):
    """A package of an optional extra is needed and absent."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs packages that are not installed", advice=f"pip install 'nestpatch[{extra}]'")
