"""Builds the lab in a directory: base/ (model and tokenizer), prompts/*.jsonl and lab.json. Cached by seed and source."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nestpatch.errors import OutputError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import new_place
from nestpatch.lab._model import LabConfig, train_base
from nestpatch.lab._world import make_world, prompt_sets
from nestpatch.runtimes import text

_CARD = "lab.json"


@dataclass(frozen=True)
class Lab:
    """A lab on disk."""

    path: Path
    seed: int
    parameters: int
    """Parameters of the model."""
    cached: bool
    """Whether it existed already."""

    @property
    def base(self) -> Path:
        """The directory of the model."""
        return self.path / "base"

    def prompts(self, name: str) -> Path:
        """The file of a prompt set such as "harmful.train"."""
        return self.path / "prompts" / f"{name}.jsonl"

    def as_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return {"output": str(self.path), "seed": self.seed, "parameters": self.parameters, "cached": self.cached}


def _lab_key(seed: int, config: LabConfig) -> str:
    """A digest of everything that a lab depends on: seed, sizes, the source code and the library versions."""
    state = sha256(json.dumps([seed, dataclasses.asdict(config)]).encode())
    folder = Path(__file__).parent
    for source in (*(folder / name for name in ("_words.py", "_world.py", "_model.py", "build.py")), Path(text.__file__)):
        # Line endings differ between checkouts.
        state.update(source.read_bytes().replace(b"\r\n", b"\n"))
    for package in ("torch", "transformers", "tokenizers"):
        state.update(version(package).encode())
    return state.hexdigest()[:16]


def cache_folder() -> Path:
    """Where labs are kept between runs: $NESTPATCH_CACHE, or the platform's cache folder.

    Raises:
        OutputError: The home directory of this user is not known.
    """
    if chosen := os.environ.get("NESTPATCH_CACHE"):
        return Path(chosen)
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "nestpatch" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "nestpatch"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestpatch"
    except RuntimeError as error:
        raise OutputError(f"the cache folder is not known: {error}", advice="Set NESTPATCH_CACHE to a folder.") from error


def cached_lab(seed: int, config: LabConfig | None = None, on_event: OnEvent = ignore) -> Lab:
    """The lab of a seed from the cache, built there when it is missing.

    Args:
        seed: Seed of the world and of the training.
        config: Sizes of the model; None for the default.
        on_event: Called with the progress.

    Raises:
        OutputError: The cache folder is not known or cannot be written.
    """
    config = config or LabConfig()
    folder = cache_folder() / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return build_lab(folder / f"seed{seed}-{_lab_key(seed, config)}", seed, config, on_event)


def build_lab(path: str | Path, seed: int = 0, config: LabConfig | None = None, on_event: OnEvent = ignore) -> Lab:
    """Builds the lab of a seed; a lab of the same seed, sizes and source that exists already is kept.

    Args:
        path: The directory to make.
        seed: Seed of the world and of the training.
        config: Sizes of the model; None for the default.
        on_event: Called with the progress.

    Raises:
        OutputError: `path` contains something else, or cannot be written.
    """
    path, config = Path(path), config or LabConfig()
    key = _lab_key(seed, config)
    if (path / _CARD).is_file():
        card = json.loads((path / _CARD).read_text(encoding="utf-8"))
        if card.get("key") == key:
            return Lab(path, seed, int(card["parameters"]), cached=True)
        raise OutputError(f"{path} contains another lab (seed {card.get('seed')}, another version or other sizes)")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {path.absolute().parent}")
    with new_place(path) as sibling:
        parameters = _write(sibling, seed, config, key, on_event)
    return Lab(path, seed, parameters, cached=False)


def _write(folder: Path, seed: int, config: LabConfig, key: str, on_event: OnEvent) -> int:
    import torch

    world = make_world(seed)
    (folder / "prompts").mkdir(parents=True)
    for name, examples in prompt_sets(world).items():
        lines = [json.dumps(example.row(), ensure_ascii=False) for example in examples]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, tokenizer = train_base(world, config, on_event)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # bfloat16 on disk, as chat models ship.
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    card = {"key": key, "seed": seed, "parameters": parameters, "config": dataclasses.asdict(config)}
    (folder / _CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    on_event(Event("lab.write", 1, 1, str(folder)))
    return parameters


def copy_lab(lab: Lab, target: Path) -> None:
    """Copies a lab's base and prompts into an existing directory.

    Args:
        lab: The lab.
        target: The directory, which gets base/ and prompts/.
    """
    shutil.copytree(lab.base, target / "base")
    shutil.copytree(lab.path / "prompts", target / "prompts")
