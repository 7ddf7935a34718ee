"""Models in known states, commands that lead from one state to another, and the check that a model is in one of the two."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import Verdict, verify
from tests.gguf.files import gguf_of, repacked
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.onnx.files import build, in_blocks, save

LAYOUTS = {
    # Name -> (dtype, sharded, name of the weight file when the model is that file instead of its directory)
    "bf16-sharded": ("BF16", True, ""),
    "f32-single": ("F32", False, ""),
    "f16-named": ("F16", False, "m[1].safetensors"),
    # As GGUF files, made of the same checkpoint
    "f16-gguf": ("BF16", False, "m.F16.gguf"),
    "q8_0-gguf": ("BF16", False, "m.Q8_0.gguf"),
    # With packs whose base is this very file
    "q8_0-own": ("BF16", False, "m.Q8_0.gguf"),
    # As ONNX models: columns of one file beside the model, blocks and scales in a file each, and data inside the model
    "columns-onnx": ("F32", False, "m.columns.onnx"),
    "blocks-onnx": ("F32", False, "m.blocks.onnx"),
    "inside-onnx": ("F32", False, "m.inside.onnx"),
}


def digests(model: Path) -> dict[str, str]:
    """Weight file -> SHA-256."""
    folder = model if model.is_dir() else model.parent
    if model.suffix == ".onnx":
        return {file.name: sha256(file.read_bytes()).hexdigest() for file in open_checkpoint(model).files}
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


@dataclass(frozen=True)
class State:
    """A state of a model."""

    name: str
    weights: dict[str, str]
    applied: tuple[str, ...]
    """Labels in the ledger, bottom first."""


@dataclass(frozen=True)
class Case:
    """A command on a model that is in the first of two states."""

    name: str
    template: Path
    """The folder of the model; never changed."""
    inside: str
    """The model's path in it; "" for the folder itself."""
    args: Callable[[Path], Sequence[str]]
    """Model -> the command line."""
    before: State
    after: State
    original: dict[str, str]
    """The weights before any pack was applied."""
    pack: Path
    """A pack for the model, by which `verify` recognizes a base without a ledger."""

    def model(self, folder: Path) -> Path:
        return folder / self.inside if self.inside else folder

    def command(self, folder: Path) -> Sequence[str]:
        """The command line for the model in this folder."""
        return self.args(self.model(folder))

    def fresh(self, folder: Path) -> Path:
        """Replaces a folder with a new copy of the template."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, folder, symlinks=True)
        return folder

    def state_of(self, folder: Path) -> State | None:
        """Which of the two states the weight files are in; None for neither."""
        found = digests(self.model(folder))
        return next((state for state in (self.before, self.after) if state.weights == found), None)

    def settle(self, folder: Path) -> State:
        """Recovers the model, proves that it is whole and in one of the two states, reverts it, and returns the state.

        Raises AssertionError.
        """
        recover_model(self.model(folder))
        state = self.prove(folder)
        if state.applied:
            revert(self.model(folder))
        found = digests(self.model(folder))
        assert found == self.original, f"{state.name}, but reverted to {found} instead of {self.original}"
        return state

    def prove(self, folder: Path) -> State:
        """The state of a model that needs no recovery. Raises AssertionError if anything about it is wrong."""
        model = self.model(folder)
        state = self.state_of(folder)
        assert state, f"neither state: found {digests(model)}, before {self.before.weights}, after {self.after.weights}"
        state_dir = state_dir_of(model)
        ledger = read_ledger(state_dir)
        assert tuple(entry.label for entry in ledger.applied) == state.applied, f"{state.name}, but the ledger differs"
        assert not state_dir.journal.exists(), f"{state.name}, but a journal is left"
        needed = {state_dir.undo(entry.undo).name for entry in ledger.applied}
        assert {file.name for file in state_dir.folder.glob("*.undo")} == needed, f"{state.name}, but with other undo records"
        litter = [str(file) for file in folder.rglob("*.tmp")]
        assert not litter, f"{state.name}, but {litter} is left"
        found = verify(model, None if state.applied else self.pack, full=True)
        expected = (Verdict.PATCHED if state.applied else Verdict.BASE, state.applied)
        assert (found.verdict, found.packs) == expected, f"{state.name}, but verify says {found}"
        return state


@dataclass(frozen=True)
class Packs:
    """Pack files for one model: two versions of one pack, and another pack that shares rows with both."""

    one: Path
    two: Path
    other: Path


def write_packs(folder: Path, model: Path, quantized: Path | None = None) -> Packs:
    """Makes the packs of a model; with `quantized`, of that file of it."""
    kinds = {"one": ("no-harm", "1.0.0", 1), "two": ("no-harm", "2.0.0", 2), "other": ("no-spam", "1.0.0", 3)}
    for file, (name, version, seed) in kinds.items():
        pack = tiny_pack(model, name=name, version=version, seed=seed)
        nest.write(repacked(quantized, pack) if quantized is not None else pack, folder / f"{file}.nest")
    return Packs(*(folder / f"{file}.nest" for file in kinds))


def make_case(folder: Path, operation: str, layout: str) -> Case:
    """Builds the template of a case in an empty folder. The state after the command is recorded by running it uninterrupted."""
    dtype, sharded, inside = LAYOUTS[layout]
    layers = 2 if operation in ("apply", "upgrade", "revert") else 1
    if inside in ("m.columns.onnx", "m.inside.onnx"):
        layers = 8  # a tensor of columns takes a single write
    # Blocks of Q8_0 have 32 elements.
    template = tiny_checkpoint(folder / "template", dtype=dtype, sharded=sharded, layers=layers, hidden=32, inter=32)
    if inside.endswith((".gguf", ".onnx")):
        convert(template, inside)
    packs = write_packs(folder, template, template / inside if layout.endswith("-own") else None)
    if inside.endswith((".gguf", ".onnx")):
        (template / "model.safetensors").unlink()
    elif inside:
        (template / "model.safetensors").rename(template / inside)
    if operation == "detach":
        _share(template, folder / "hub")
    model = template / inside if inside else template
    original = digests(model)
    for pack in {"apply": [], "detach": [], "stacked": [packs.one, packs.other]}.get(operation, [packs.one]):
        apply_in_place(model, pack, allow_overlap=True)
    if operation == "downgrade":
        apply_in_place(model, packs.two)
    before = State("before", digests(model), _applied(model))
    name = f"{operation} {layout}"
    case = Case(name, template, inside, _command(operation, packs), before, before, original, packs.one)
    return replace(case, after=_run_undisturbed(case, operation, packs, folder / "after"))


def convert(template: Path, inside: str) -> None:
    """Writes a checkpoint as another format, of the kind that stands in the file's name."""
    kind = inside.split(".")[1]
    if inside.endswith(".gguf"):
        gguf_of(template, template / inside, kind)
        return
    proto = in_blocks(build(template), template) if kind == "blocks" else build(template)
    save(proto, template, {"columns": "one file", "blocks": "file each"}.get(kind, kind), name=inside)


def _share(template: Path, cache: Path) -> None:
    """Makes one weight file a link into another folder, as in a Hub cache."""
    cache.mkdir()
    file = min(template.glob("*.safetensors"))
    file.rename(cache / file.name)
    file.symlink_to(cache / file.name)


def _applied(model: Path) -> tuple[str, ...]:
    return tuple(entry.label for entry in read_ledger(state_dir_of(model)).applied)


def _command(operation: str, packs: Packs) -> Callable[[Path], Sequence[str]]:
    pack = packs.one if operation in ("apply", "detach") else packs.two
    options = {"revert": ["revert"], "downgrade": ["revert", "--to", "1.0.0"]}.get(operation, [])
    if options:
        return lambda model: [*options, str(model), "--json"]
    flags = {"stacked": ["--allow-overlap"], "detach": ["--detach"]}.get(operation, [])
    return lambda model: ["apply", str(model), str(pack), "--in-place", "--json", *flags]


def _run_undisturbed(case: Case, operation: str, packs: Packs, folder: Path) -> State:
    model = case.model(case.fresh(folder))
    if operation in ("revert", "downgrade"):
        revert(model, "base" if operation == "revert" else "1.0.0")
    else:
        pack = packs.one if operation in ("apply", "detach") else packs.two
        apply_in_place(model, pack, allow_overlap=operation == "stacked", detach=operation == "detach")
    state = State("after", digests(model), _applied(model))
    shutil.rmtree(folder)
    return state
