"""What ONNX models cost: `python -m bench.onnx [--quick] [--rounds N] [--log]`.

A random bf16 Llama, exported to fp32 and to int4, whose files are patched in place. Beside it: exporting the merged model anew
with nestpatch, which also compares the graph with the model, and `torch.onnx.export` alone. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench import readme
from bench.harness import TOOL, Run, digest_file, in_rounds, measure, options_of, prepared, publish, ratios_of
from bench.model import QUICK, cached_model, forget, parameters, write_tokenizer

KINDS: dict[str, list[str]] = {"fp32": [], "int4": ["--int4"]}
"""Options of an export."""
DATA = "model.onnx_data"


def prepare(size: str) -> None:
    """Makes the model, its exports and one that takes patches at run time, and prints their folder."""
    folder = cached_model(size)
    write_tokenizer(folder / "base")
    for kind, options in {**KINDS, "adapter-ready": ["--adapter-ready"]}.items():
        if not (folder / kind).is_dir():  # an export is there or not, never in part
            command = [*TOOL, "export", folder / "base", "--to", "onnx", *options, "-o", folder / kind]
            subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    print(folder)


def export_plainly(model: str, output: str) -> None:
    """The contender: torch's exporter and nothing else, a graph without a cache, unchecked."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.ones(2, 8, dtype=torch.int64)
    shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    Path(output).mkdir()
    with torch.no_grad():
        torch.onnx.export(
            loaded,
            kwargs={"input_ids": ids, "use_cache": False},
            f=f"{output}/model.onnx",
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def contenders(folder: Path) -> dict[str, list[object]]:
    """Name -> command, in the order of a round."""
    base, pack = folder / "base", folder / "patch.nest"
    found: dict[str, list[object]] = {}
    for kind, options in KINDS.items():
        work = folder / f"work-{kind}"
        found |= {
            f"cp_{kind}": ["cp", "-r", folder / kind, work],
            f"in_place_{kind}": [*TOOL, "apply", work, pack, "--in-place", "--base", base, "--json"],
            f"verify_{kind}": [*TOOL, "verify", work, "--json"],
            f"export_{kind}": [*TOOL, "export", base, pack, "--to", "onnx", *options, "-o", folder / f"new-{kind}", "--json"],
            f"revert_{kind}": [*TOOL, "revert", work, "--json"],
        }
    adapter, ready = folder / "patch.onnx_adapter", folder / "adapter-ready"
    found["adapter"] = [*TOOL, "export", pack, "--to", "onnx-adapter", "--for", ready, "-o", adapter, "--json"]
    found["torch_export"] = [sys.executable, "-m", "bench.onnx", "--step", "plain", base, folder / "new-plain"]
    return found


def one_round(folder: Path, commands: dict[str, list[object]]) -> dict[str, Run]:
    """Each contender once; what was patched in place has to be the export of the merged model, then what it was."""
    results = {}
    for name, command in commands.items():
        results[name], said = measure(command)
        what, _, kind = name.partition("_")
        work, new = folder / f"work-{kind}" / DATA, folder / f"new-{kind}"
        if what == "verify" and json.loads(said)["verdict"] != "patched":
            sys.exit(said)
        if what == "export" and digest_file(work) != digest_file(new / DATA):
            sys.exit(f"{work} is not what an export of the merged model gives")
        if what == "revert" and digest_file(work) != digest_file(folder / kind / DATA):
            sys.exit("after revert the file is not what it was")
        if what in ("export", "adapter", "torch"):
            clear(folder, "new-*", "*.onnx_adapter")
    clear(folder, "work-*")
    return results


def clear(folder: Path, *patterns: str) -> None:
    """Removes what a round has made."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """Measures, prints the table and the JSON object."""
    options = options_of(__doc__, QUICK | readme.OPTION, rounds=3).parse_args()
    size = "quick" if options.quick else "1b"
    folder = prepared("bench.onnx", size)
    clear(folder, "work-*", "new-*", "*.onnx_adapter")
    results = in_rounds(partial(one_round, folder, contenders(folder)), options.rounds)
    forget(folder / "base")
    pairs = [(f"export_{kind}", f"in_place_{kind}") for kind in KINDS]
    pairs += [("torch_export", "in_place_fp32"), ("cp_fp32", "in_place_fp32"), ("cp_int4", "in_place_int4")]
    memory = {f"{a}/{b}": results[a].rss_mb / results[b].rss_mb for a, b in pairs if not a.startswith("cp")}
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in memory.items())
    publish(
        f"ONNX models of {parameters(size) / 1e9:.2f} B parameters",
        f"Whole processes in turn, medians of {options.rounds} rounds after one\nthat was not counted. In every round the files"
        " patched in place were, by SHA-256, those of the exported merged model, and after\nthe revert what they had been."
        f" Ratios of the peak memory: {peaks}.",
        results,
        {
            "parameters": parameters(size),
            "rounds": options.rounds,
            "ratios": ratios_of(results, pairs),
            "memory_ratios": memory,
        },
        log=options.log,
    )
    if options.readme and not options.quick:
        readme.keep("onnx", results, parameters=parameters(size), rounds=options.rounds)


if sys.argv[1:2] == ["--step"]:
    {"prepare": prepare, "plain": export_plainly}[sys.argv[2]](*sys.argv[3:])
elif __name__ == "__main__":
    main()
