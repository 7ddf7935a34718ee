"""Other ways to bring a change into a model, beside which `bench.patch` measures nestpatch.

All of them write the whole model anew. PEFT and mergekit merge a LoRA of rank 8 on the projections that the pack changes; the
script and llama.cpp's llama-export-lora merge the pack itself. A peer that is not here is left out, with a line that says how
to get it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.harness import TOOL
from bench.model import write_tokenizer

LORA_RANK = 8
"""With random factors."""
EXPORT_LORA = "LLAMA_EXPORT_LORA"
"""The environment variable that names the program."""


def load(model: Path) -> Any:
    """The model in PEFT's hands."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)


def merge_adapter(model: Path, adapter: Path, output: Path) -> None:
    """What PEFT's documentation tells to do."""
    from peft import PeftModel

    PeftModel.from_pretrained(load(model), adapter).merge_and_unload().save_pretrained(output)


def export_lora_program() -> str | None:
    """The path of llama-export-lora, or None."""
    return os.environ.get(EXPORT_LORA) or shutil.which("llama-export-lora")


def prepare_peers(folder: Path) -> None:
    """Makes what the peers need in a model's folder, where it is missing.

    Args:
        folder: Has base/ and patch.nest.
    """
    if importlib.util.find_spec("peft"):
        _write_lora(folder)
    if importlib.util.find_spec("mergekit"):
        recipe = {
            "models": [{"model": f"{folder / 'base'}+{folder / 'lora'}"}],
            "merge_method": "passthrough",
            "dtype": "bfloat16",
        }
        (folder / "mergekit.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    if export_lora_program() is not None:
        _write_gguf(folder)


def _write_lora(folder: Path) -> None:
    if (folder / "lora" / "adapter_config.json").is_file():
        return
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(load(folder / "base"), config).save_pretrained(folder / "lora")


def _write_gguf(folder: Path) -> None:
    """The base as a GGUF file, and the pack as an adapter of llama.cpp."""
    base, file, adapter = folder / "base", folder / "bf16.gguf", folder / "pack.gguf"
    if not file.is_file():
        write_tokenizer(base)
        _run([*TOOL, "export", base, "--to", "gguf", "--type", "bf16", "-o", file])
    adapter.unlink(missing_ok=True)
    _run([*TOOL, "export", folder / "patch.nest", "--to", "gguf-lora", "-o", adapter])


def _run(command: list[object]) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)


def peers_of(folder: Path) -> dict[str, list[object]]:
    """Name -> command of every peer that is here.

    Args:
        folder: As `prepare_peers` left it. Every command may write `out` and everything in it.
    """
    model, pack, out = folder / "base", folder / "patch.nest", folder / "out"
    found: dict[str, list[object]] = {"script": [sys.executable, "-m", "bench.merge_script", model, pack, out]}
    if importlib.util.find_spec("peft"):
        found["peft"] = [sys.executable, "-m", "bench.peers", model, folder / "lora", out]
    if importlib.util.find_spec("mergekit"):
        start = "from mergekit.scripts.run_yaml import main; main()"
        place = ["--lora-merge-cache", out / "cache", "--no-copy-tokenizer"]
        found["mergekit"] = [sys.executable, "-c", start, folder / "mergekit.yaml", out / "merged", *place]
    if (program := export_lora_program()) is not None:
        file, adapter = folder / "bf16.gguf", folder / "pack.gguf"
        found["in_place_gguf"] = [*TOOL, "apply", file, pack, "--in-place", "--json"]
        found["revert_gguf"] = [*TOOL, "revert", file, "--json"]
        found["export_lora"] = [program, "-m", file, "--lora", adapter, "-o", folder / "out.gguf"]
    return found


def absent() -> list[str]:
    """One line for every peer that is not measured."""
    lines = []
    if not importlib.util.find_spec("peft"):
        lines.append("peft is not installed: measured without it (pip install peft)")
    if not importlib.util.find_spec("mergekit"):
        lines.append(
            "mergekit is not installed: measured without it"
            " (pip install --target DIR --no-deps mergekit immutables, then PYTHONPATH=DIR)"
        )
    if export_lora_program() is None:
        lines.append(f"llama-export-lora of llama.cpp is not here: measured without it (set {EXPORT_LORA} to the program)")
    return lines


if __name__ == "__main__":
    merge_adapter(*map(Path, sys.argv[1:]))
