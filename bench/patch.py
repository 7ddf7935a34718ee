"""What patching costs, beside copying the model and merging a LoRA: `python -m bench.patch [--quick] [--large] [--log]`.

Every contender is a whole process. They take turns, with a warm page cache: a first round is not counted. Before each one all
dirty pages are written out, so that none pays for the one before. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench._floor import build_floor, write_job
from bench.harness import TOOL, Run, digest_file, in_rounds, measure, options_of, prepared, publish, ratios_of
from bench.model import QUICK, cached_model, forget, parameters

LORA_RANK = 8
"""On the same projections, with random factors."""


def load(model: Path) -> Any:
    """The model in PEFT's hands."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)


def merge_adapter(model: Path, adapter: Path, output: Path) -> None:
    """The contender: what PEFT's documentation tells to do."""
    from peft import PeftModel

    PeftModel.from_pretrained(load(model), adapter).merge_and_unload().save_pretrained(output)


def prepare(size: str) -> None:
    """Makes base/, patch.nest and lora/ where they are missing, and prints their folder."""
    folder = cached_model(size)
    if size != "large" and importlib.util.find_spec("peft") and not (folder / "lora" / "adapter_config.json").is_file():
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=LORA_RANK, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(load(folder / "base"), config).save_pretrained(folder / "lora")
    if build_floor(folder) is not None:
        write_job(folder / "base" / "model.safetensors", folder / "patch.nest", folder / "floor.job")
        (folder / "kept").mkdir(exist_ok=True)
    print(folder)


def contenders(folder: Path, *, large: bool) -> dict[str, list[object]]:
    """Name -> command, in the order of a round."""
    model, pack, out = folder / "base", folder / "patch.nest", folder / "out"
    found: dict[str, list[object]] = {}
    if (folder / "floor").is_file():
        job = [folder / "floor.job", model / "model.safetensors", folder / "kept"]
        found = {f"floor_{what}": [folder / "floor", what, *job] for what in ("apply", "revert")}
    found |= {
        "in_place": [*TOOL, "apply", model, pack, "--in-place", "--json"],
        "verify": [*TOOL, "verify", model, "--json"],
        "revert": [*TOOL, "revert", model, "--json"],
    }
    if not large:
        found["copy"] = [*TOOL, "apply", model, pack, "-o", out, "--json"]
        found["copy_no_sync"] = [*TOOL, "apply", model, pack, "-o", out, "--json", "--no-sync"]
        found["cp"] = ["cp", "-r", model, out]
        found["cp_sync"] = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", model, out]
        if importlib.util.find_spec("peft"):
            found["peft"] = [sys.executable, "-m", "bench.patch", "--step", "merge", model, folder / "lora", out]
    return found


def one_round(folder: Path, commands: dict[str, list[object]]) -> dict[str, Run]:
    """Each contender once. Outputs and what nestpatch keeps are removed, so that each apply is a first one."""
    results, model = {}, folder / "base"
    for name, command in commands.items():
        results[name], said = measure(command)
        if name == "verify" and json.loads(said)["verdict"] != "patched":
            sys.exit(said)
        if name not in ("in_place", "verify"):
            forget(model)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return results


def measure_all(size: str, rounds: int) -> dict[str, Run]:
    """The medians of the rounds that count."""
    folder = prepared("bench.patch", size)
    shutil.rmtree(folder / "out", ignore_errors=True)
    results = in_rounds(partial(one_round, folder, contenders(folder, large=size == "large")), rounds)
    if digest_file(folder / "base" / "model.safetensors") != (folder / "base.sha256").read_text():
        sys.exit("after revert the model is not what it was")
    return results


def main() -> None:
    """Measures, prints the table and the JSON object."""
    large = {"--large": "also a sparse model of 4 B parameters, in place only"}
    options = options_of(__doc__, QUICK | large).parse_args()
    size = "quick" if options.quick else "full"
    results = measure_all(size, options.rounds)
    if "peft" not in results:
        print("peft is not installed: measured without it (pip install peft)")
    facts: dict[str, Any] = {"parameters": parameters(size), "rounds": options.rounds, "peft_s": None, "peft_rss_mb": None}
    if options.large:
        results |= {f"large_{name}": run for name, run in measure_all("large", options.rounds).items()}
        facts["large_parameters"] = parameters("large")
    pairs = [
        ("in_place", "floor_apply"),
        ("revert", "floor_revert"),
        ("peft", "in_place"),
        ("peft", "copy"),
        ("cp", "in_place"),
        ("copy_no_sync", "cp"),
        ("copy", "cp_sync"),
    ]
    facts["ratios"] = ratios_of(results, pairs)
    publish(
        f"patching {parameters(size) / 1e9:.2f} B parameters",
        f"Whole processes in turn, medians of {options.rounds} rounds, page cache\nwarm after a round that was not counted. The"
        " nestpatch commands sync what they write, and `cp_sync`; `copy_no_sync`,\n`cp` and `peft` do not. After revert the"
        " model's SHA-256 was the original.",
        results,
        facts,
        log=options.log,
    )


if sys.argv[1:2] == ["--step"]:
    {"prepare": prepare, "merge": merge_adapter}[sys.argv[2]](*sys.argv[3:])
elif __name__ == "__main__":
    main()
