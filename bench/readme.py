"""README's tables of speed, from what `bench.patch`, `bench.large` and `bench.onnx` have measured: `python -m bench.readme`.

With `--readme` these keep their numbers in results/speed.json, with the date and the machine, and write the tables anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.harness import Run, machine

OPTION = {"--readme": "keep the numbers in bench/results/speed.json and write README's tables from them"}
"""The flag of the benchmarks whose numbers README shows."""
KEPT = Path(__file__).with_name("results") / "speed.json"
README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- speed: written by `make bench` -->", "<!-- end of speed -->")

Measured = dict[str, Any]
"""One benchmark's date, machine, parameters, rounds and runs."""

_DENSE = {
    "in_place": "apply in place",
    "verify": "verify",
    "revert": "revert",
    "floor_apply": "a C program that does the least of apply",
    "copy": "apply into a copy, synced",
    "cp_sync": "`cp -r`, synced",
    "script": "torch and safetensors, a script of twenty lines",
    "peft": "PEFT `merge_and_unload` and `save_pretrained`",
    "mergekit": "mergekit, its LoRA merged",
    "in_place_gguf": "apply in place, bf16 GGUF file",
    "export_lora": "llama.cpp's `llama-export-lora`, the same file; beside the row above",
}
_LARGE = {"in_place": "apply in place", "verify": "verify", "update": "update to the next version", "revert": "revert"}
_FORMATS = {"": "safetensors", "gguf_": "GGUF Q4_K_M, exactly"}
_ONNX = {
    "in_place_int4": "its int4 export, patched in place, exactly",
    "in_place_fp32": "its fp32 export, patched in place",
    "export_fp32": "the merged model exported again",
    "torch_export": "`torch.onnx.export` alone",
}


def keep(name: str, results: dict[str, Run], **facts: Any) -> None:
    """Keeps what was measured under a name, with what was on the same day in the same way, and writes README's tables."""
    found = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else {}
    facts = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "machine": machine(), **facts}
    earlier = found.get(name, {"runs": {}})
    if {**earlier, **facts} != earlier:
        earlier = {"runs": {}}
    runs = {who: {what: float(f"{value:.4g}") for what, value in run._asdict().items()} for who, run in results.items()}
    found[name] = {**facts, "runs": earlier["runs"] | runs}
    KEPT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    write()


def write() -> None:
    """Writes the tables between the marks of README."""
    before, rest = README.read_text("utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(f"{before}{MARKS[0]}\n\n{tables(json.loads(KEPT.read_text('utf-8')))}\n\n{MARKS[1]}{after}", "utf-8")


def tables(found: dict[str, Measured]) -> str:
    """The text between the marks.

    Args:
        found: The content of results/speed.json.

    Returns:
        Markdown, a table of each kind that was measured.
    """
    kinds = (
        (_dense, _labelled(found, {"1b": "1.1 B", "3b": "3.2 B"})),
        (_large, _labelled(found, {"8b": "8 B", "70b": "70 B"})),
        (_onnx, _labelled(found, {"onnx": "1.1 B"})),
    )
    return "\n\n".join(part for table, models in kinds if models for part in table(models))


def _labelled(found: dict[str, Measured], labels: dict[str, str]) -> list[Measured]:
    return [{**found[name], "label": label} for name, label in labels.items() if name in found]


def _dense(models: Sequence[Measured]) -> tuple[str, str]:
    head = ["", *(f"{model['label']}{what}" for model in models for what in (", s", ", ratio", ", MB"))]
    rows = []
    for name, label in _DENSE.items():
        if any(name in model["runs"] for model in models):
            rows.append([label, *(cell for model in models for cell in _cells(model["runs"], name))])
    intro = "bfloat16 Llamas; the ratio is that to applying in place, MB the peak memory"
    return f"{intro} ({_measured(models)}):", _table(head, rows)


def _cells(runs: dict[str, dict[str, float]], name: str) -> list[str]:
    if name not in runs:
        return ["", "", ""]
    beside = "in_place_gguf" if name == "export_lora" else "in_place"
    ratio = runs[name]["seconds"] / runs[beside]["seconds"]
    return [_number(runs[name]["seconds"]), f"{_number(ratio)}x", f"{runs[name]['rss_mb']:,.0f}"]


def _large(models: Sequence[Measured]) -> tuple[str, str]:
    head = ["", *(f"{model['label']}{what}" for model in models for what in (", s", ", MB"))]
    rows = []
    for prefix, kind in _FORMATS.items():
        for name, label in _LARGE.items():
            runs = [model["runs"].get(prefix + name) for model in models]
            cells = [cell for run in runs for cell in _plain_cells(run)]
            if any(runs):
                rows.append([f"{label}, {kind}", *cells])
    what = (
        "Sparse files with the shapes of Llama 3.1, whose touched rows hold numbers: 3 % of the neurons in half of the layers"
    )
    return f"{what}\n({_measured(models)}):", _table(head, rows)


def _onnx(models: Sequence[Measured]) -> tuple[str, str]:
    runs = models[0]["runs"]
    rows = [[label, *_plain_cells(runs[name])] for name, label in _ONNX.items() if name in runs]
    return f"The model of {models[0]['label']} in ONNX ({_measured(models)}):", _table(["", "s", "MB"], rows)


def _plain_cells(run: dict[str, float] | None) -> list[str]:
    return ["", ""] if run is None else [_number(run["seconds"]), f"{run['rss_mb']:,.0f}"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _measured(models: Sequence[Measured]) -> str:
    """When, where and how often, each model by itself where they differ."""
    facts = {model["label"]: f"{model['date']}, {model['machine']}, {_rounds(model['rounds'])}" for model in models}
    if len(set(facts.values())) == 1:
        return next(iter(facts.values()))
    return "; ".join(f"{label}: {fact}" for label, fact in facts.items())


def _rounds(count: int) -> str:
    return f"medians of {count} rounds" if count > 1 else "one round"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


if __name__ == "__main__":
    write()
