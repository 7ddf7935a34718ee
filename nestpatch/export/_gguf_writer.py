"""Writes a GGUF file from a checkpoint, tensor by tensor: memory stays flat, weights of the wanted type are copied as bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestpatch import __version__
from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export._gguf_families import family_of
from nestpatch.export._gguf_tensors import Target, plan_tensors, write_tensor
from nestpatch.export._gguf_tokenizer import Vocabulary, read_vocabulary
from nestpatch.export._model_config import model_name, read_config
from nestpatch.export._quantizer import quantize_file, require_quantizer
from nestpatch.export.results import ExportedGguf
from nestpatch.files.hashing import Sink, seal
from nestpatch.files.scratch import WHOLE, claimed, new_output, scratch
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.gguf import quants
from nestpatch.formats.gguf.header import Facts, encode_header, padding
from nestpatch.formats.gguf.package import gguf_module
from nestpatch.formats.gguf.quants import AUTO, FileType, file_type
from nestpatch.formats.provenance import VERSION

EMBEDDINGS = "token_embd.weight"


@dataclass(frozen=True, eq=False)
class GgufPlan:
    """Everything in the file except the bytes of its tensors."""

    architecture: str
    kind: FileType
    facts: Facts
    """By their full keys."""
    vocabulary: Vocabulary
    targets: tuple[Target, ...]
    notes: tuple[str, ...]

    @property
    def type(self) -> str:
        """The file type as it is stored; for AUTO that of most weights, by bytes."""
        if self.kind.name != AUTO:
            return self.kind.name
        sizes: dict[str, int] = {}
        for target in self.targets:
            if len(target.shape) > 1:
                sizes[target.dtype] = sizes.get(target.dtype, 0) + target.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default="F32")

    def header(self) -> bytes:
        """All bytes before those of the tensors."""
        facts = {
            **self.facts,
            "general.size_label": _size_label(self.targets),
            # llama.cpp replaces the number when it quantizes.
            "general.file_type": quants.code(self.type if self.kind.direct else "F16"),
            "general.quantization_version": gguf_module("constants").GGML_QUANT_VERSION,
            **self.vocabulary.facts,
        }
        return encode_header(facts, [(target.name, target.shape, target.dtype, target.nbytes) for target in self.targets])


def plan_gguf(checkpoint: Checkpoint, kind: FileType, name: str, keys: Mapping[str, str]) -> GgufPlan:
    """Reads the configuration and the tokenizer of a model and plans every tensor of its file.

    Args:
        checkpoint: The model.
        kind: The file type.
        name: The model's name in the metadata.
        keys: Metadata to add, unchanged.

    Returns:
        The plan.

    Raises:
        UnsupportedModelError: llama.cpp does not run the model, or reads its tokenizer differently.
        CheckpointFormatError: A file or a tensor is missing or broken.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = read_config(folder)
    family = family_of(config)
    with _sound(folder / "config.json"):
        config = config.with_defaults(family.defaults)
        if config.layers > (tensors := len(checkpoint.tensors())):
            raise CheckpointFormatError(f"config.json has {config.layers} layers, but the model has {tensors} tensors")
        specifics = family.facts(config)
        targets = plan_tensors(checkpoint, config, family, kind)
    embeddings = next((target for target in targets if target.name == EMBEDDINGS), None)
    if embeddings is None:
        raise CheckpointFormatError(f"{checkpoint.path} has no embeddings")
    rows, width = embeddings.shape
    if width != config.number("hidden_size"):
        raise CheckpointFormatError(f"the embeddings are {width} wide; hidden_size is {config.number('hidden_size')}")
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
    """Turns the errors of code that reads a JSON value of an unexpected form into a CheckpointFormatError."""
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
) -> ExportedGguf:
    """Writes a checkpoint as a GGUF file.

    Args:
        checkpoint: The model.
        target: The new file.
        kind: The file type, for `file_type`.
        name: The model's name in the metadata; that of its directory when None.
        keys: Metadata to add.
        dry_run: Whether to plan only.
        on_event: Receives the steps.
        confirm: Called before the file gets its name; when it raises, no file is left.

    Returns:
        What was written, or would be.

    Raises:
        UnsupportedModelError: llama.cpp does not run the model, or reads its tokenizer differently.
        CheckpointFormatError: A file or a tensor is missing or broken.
        DataError: There is no such file type.
        QuantizationError: Values leave the range of a type, or llama.cpp cannot quantize the file.
        OutputError: The path exists already, or cannot be written.
        MissingExtraError: The file must be quantized, and llama-cpp-python is not installed.
    """
    began = time.perf_counter()
    wanted = file_type(kind)
    if not wanted.direct:
        require_quantizer()
    plan = plan_gguf(checkpoint, wanted, name or model_name(checkpoint.path), keys or {})
    nbytes, digest = 0, ""
    if not dry_run:
        with new_output(target) as sibling:
            if wanted.direct:
                nbytes, digest = _write(plan, checkpoint, sibling, on_event)
            else:
                with scratch(sibling, WHOLE) as whole, claimed(whole):
                    _write(plan, checkpoint, whole, on_event, kept=False)
                    quantize_file(whole, sibling, wanted.name, on_event)
                nbytes, digest = seal(sibling)
            confirm()
    elif wanted.direct:
        nbytes = len(plan.header()) + sum(target.nbytes + padding(target.nbytes) for target in plan.targets)
    return ExportedGguf(
        output=target,
        nbytes=nbytes,
        sha256=digest,
        tensors=len(plan.targets),
        type=plan.type,
        architecture=plan.architecture,
        notes=plan.notes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _write(plan: GgufPlan, checkpoint: Checkpoint, path: Path, on_event: OnEvent, *, kept: bool = True) -> tuple[int, str]:
    """Writes the file as planned. Returns (bytes, SHA-256); the digest of a file that is not kept is not taken."""
    with Sink(path, kept=kept) as sink:
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
    """The size in words: "1.1B"; of a mixture, the number of experts and the size of one with the shared part: "8x7B"."""
    stacks = [target.shape for target in targets if target.name.endswith("_exps.weight")]
    shared = sum(math.prod(target.shape) for target in targets if not target.name.endswith("_exps.weight"))
    each = sum(math.prod(shape[1:]) for shape in stacks)
    count = stacks[0][0] if stacks else 0
    size_label = gguf_module("utility").size_label
    return str(size_label(shared + sum(math.prod(shape) for shape in stacks), shared, each, count))
