"""Writes a GGUF file from a checkpoint, tensor by tensor: memory stays flat, weights of the wanted type are copied as bytes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestpatch import __version__
from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export import _quantizer as quantizing
from nestpatch.export._gguf_families import family_of
from nestpatch.export._gguf_tensors import Target, plan_tensors, total, write_tensor
from nestpatch.export._gguf_tokenizer import Vocabulary, read_vocabulary
from nestpatch.export._model_config import read_config
from nestpatch.files.hashing import Sink, seal
from nestpatch.files.scratch import WHOLE, claimed, new_output, scratch
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.gguf import quants as gguf_types
from nestpatch.formats.gguf.header import Facts, encode_header, padding
from nestpatch.formats.gguf.quants import AUTO, FileType, file_type
from nestpatch.formats.provenance import VERSION


@dataclass(frozen=True)
class WrittenModel:
    """A file or directory that was written, or with `dry_run` would be."""

    path: Path
    nbytes: int
    """0 after a dry run where llama.cpp decides on it, tensor by tensor."""
    sha256: str
    """Of the file; empty after a dry run, and for a directory of several."""
    tensors: int
    type: str
    """The dtype of the weights."""
    architecture: str
    """As the format names it; empty where it does not."""
    notes: tuple[str, ...]
    """What a user should know of this file."""
    seconds: float
    dry_run: bool = False


EMBEDDINGS = "token_embd.weight"


@dataclass(frozen=True, eq=False)
class GgufPlan:
    """Everything of the file but the bytes of its tensors."""

    architecture: str
    kind: FileType
    facts: Facts
    """Keys in full."""
    vocabulary: Vocabulary
    targets: tuple[Target, ...]
    notes: tuple[str, ...]

    @property
    def type(self) -> str:
        """The type that the file says it has."""
        return self.kind.name if self.kind.name != AUTO else next(iter(total(self.targets)), "F32")

    def header(self) -> bytes:
        """All that comes before the tensors' bytes."""
        from gguf import GGML_QUANT_VERSION

        facts = {
            **self.facts,
            "general.size_label": _size_label(self.targets),
            # What llama.cpp quantizes gets its number from llama.cpp.
            "general.file_type": gguf_types.code(self.type if self.kind.direct else "F16"),
            "general.quantization_version": GGML_QUANT_VERSION,
            **self.vocabulary.facts,
        }
        return encode_header(facts, [(target.name, target.shape, target.dtype, target.nbytes) for target in self.targets])

    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header()) + sum(target.nbytes + padding(target.nbytes) for target in self.targets)


def plan_gguf(checkpoint: Checkpoint, kind: FileType, name: str, keys: Mapping[str, str]) -> GgufPlan:
    """Reads config and tokenizer and decides on every tensor. `keys` go into the file as they are.

    Raises UnsupportedModelError, CheckpointFormatError.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = read_config(folder)
    family = family_of(config)
    with _sound(folder / "config.json"):
        config = config.with_defaults(family.defaults)
        if config.layers > len(checkpoint.tensors()):
            raise CheckpointFormatError(f"it says {config.layers} layers, and there are {len(checkpoint.tensors())} tensors")
        specifics = family.facts(config)
        targets = plan_tensors(checkpoint, config, family, kind)
    embeddings = next((target for target in targets if target.name == EMBEDDINGS), None)
    if embeddings is None:
        raise CheckpointFormatError(f"{checkpoint.path} has no embeddings")
    rows, width = embeddings.shape
    if width != config.number("hidden_size"):
        raise CheckpointFormatError(f"the embeddings are {width} wide, and config.json says {config.number('hidden_size')}")
    with _sound(folder / "the tokenizer"):
        vocabulary = read_vocabulary(folder, rows, name)
    facts: Facts = {"general.architecture": family.gguf, "general.type": "model", "general.name": name}
    facts |= {VERSION: __version__, **keys}
    facts |= {f"{family.gguf}.{key}": value for key, value in specifics.items()}
    facts[f"{family.gguf}.vocab_size"] = rows
    notes = family.notes(config) + vocabulary.notes
    return GgufPlan(family.gguf, kind, facts, vocabulary, tuple(targets), notes)


@contextmanager
def _sound(file: Path) -> Iterator[None]:
    """Raises CheckpointFormatError where a JSON file holds something of another form than it should."""
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointFormatError(f"{file} is broken: {error!r}") from error


def write_gguf(
    checkpoint: Checkpoint,
    target: Path,
    *,
    kind: str = AUTO,
    name: str | None = None,
    keys: Mapping[str, str] | None = None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
    confirm: Callable[[], None] = lambda: None,
) -> WrittenModel:
    """Exports a checkpoint to a GGUF file that appears whole or not at all.

    Types that llama.cpp mixes itself need llama-cpp-python; they start from a temporary file beside the target that has lost
    nothing. `keys` are metadata to add. `confirm` is called before the file gets its name: if it raises, there is no file.

    Raises UnsupportedModelError, CheckpointFormatError, QuantizationError, DataError for an unknown type, OutputError,
    MissingExtraError without llama-cpp-python.
    """
    began = time.perf_counter()
    wanted = file_type(kind)
    if not wanted.direct:
        quantizing.require()
    plan = plan_gguf(checkpoint, wanted, name or model_name(checkpoint.path), keys or {})
    if dry_run:
        nbytes, digest = plan.size() if wanted.direct else 0, ""
    else:
        with new_output(target) as sibling:
            nbytes, digest = _export(plan, checkpoint, sibling, on_event)
            confirm()
    seconds = time.perf_counter() - began
    tensors = len(plan.targets)
    return WrittenModel(target, nbytes, digest, tensors, plan.type, plan.architecture, plan.notes, seconds, dry_run)


def model_name(path: Path) -> str:
    """What a model is called: its directory, or its repository in a Hub cache. Never changed: llama.cpp reads rules from it."""
    place = Path(os.path.abspath(path))
    if place.is_file():
        place = place.parent
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
        return place.parent.parent.name.rpartition("--")[2]
    return place.name or "model"


def _export(plan: GgufPlan, checkpoint: Checkpoint, path: Path, on_event: OnEvent) -> tuple[int, str]:
    """(bytes, SHA-256) of the file, quantized where its type wants that."""
    if plan.kind.direct:
        return _write(plan, checkpoint, path, on_event)
    with scratch(path, WHOLE) as whole, claimed(whole):
        _write(plan, checkpoint, whole, on_event)
        quantizing.quantize(whole, path, plan.kind.name, on_event)
    return seal(path)


def _write(plan: GgufPlan, checkpoint: Checkpoint, path: Path, on_event: OnEvent) -> tuple[int, str]:
    """(bytes, SHA-256) of the file written."""
    with Sink(path) as sink:
        sink.write(plan.header())
        for number, target in enumerate(plan.targets, start=1):
            before = sink.nbytes
            write_tensor(target, checkpoint, sink)
            if sink.nbytes - before != target.nbytes:
                raise CheckpointFormatError(f"{target.name} has {sink.nbytes - before} bytes instead of {target.nbytes}")
            sink.write(bytes(padding(target.nbytes)))
            on_event(Event("export", number, len(plan.targets), target.name))
    return sink.nbytes, sink.sha256


def _size_label(targets: Sequence[Target]) -> str:
    """The size in words: "1.1B", or for experts their number and what one of them has with the shared part, "8x7B"."""
    from gguf import size_label

    shared = sum(math.prod(target.shape) for target in targets if not target.is_stack)
    experts = [target.shape for target in targets if target.is_stack]
    each = sum(math.prod(shape[1:]) for shape in experts)
    count = experts[0][0] if experts else 0
    return str(size_label(shared + sum(math.prod(shape) for shape in experts), shared, each, count))
