"""What GGUF files cost: `python -m bench.gguf [--quick] [--rounds N] [--llama-cpp DIR] [--log]`.

Export of a random bf16 Llama to bf16 beside `cp`, and beside llama.cpp's own converter where a checkout is given; patching its
Q4_K_M file in place, exactly, and its Q8_0 file from its own rows. Whole processes in turn; the last line of stdout is one JSON
object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench.harness import TOOL, Run, digest_file, in_rounds, measure, options_of, prepared, publish, ratios_of
from bench.model import QUICK, cached_model, forget, parameters, write_tokenizer

KINDS = ("q4_k_m", "q8_0")
"""Patched from the float base, and from their own rows."""


def prepare(size: str) -> None:
    """Makes the model and its quantized files, and prints their folder."""
    folder = cached_model(size)
    write_tokenizer(folder / "base")
    for kind in KINDS:
        file = folder / f"{kind}.gguf"
        if not file.is_file():
            command = [*TOOL, "export", folder / "base", "--to", "gguf", "--type", kind, "-o", file]
            subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    print(folder)


def contenders(folder: Path, converter: Path | None) -> dict[str, list[object]]:
    """Name -> command, in the order of a round."""
    base, out = folder / "base", folder / "out.gguf"
    (exact, own), pack = (folder / f"work-{kind}.gguf" for kind in KINDS), folder / "patch.nest"
    found: dict[str, list[object]] = {
        "cp_model": ["cp", base / "model.safetensors", out],
        "export_bf16": [*TOOL, "export", base, "--to", "gguf", "--type", "bf16", "-o", out, "--json"],
        "export_q8_0": [*TOOL, "export", base, "--to", "gguf", "--type", "q8_0", "-o", out, "--json"],
    }
    if converter is not None:
        script = converter / "convert_hf_to_gguf.py"
        found["llama_cpp_bf16"] = [sys.executable, script, base, "--outtype", "bf16", "--outfile", out]
    return found | {
        "cp_q4_k_m": ["cp", folder / "q4_k_m.gguf", exact],
        "exact_q4_k_m": [*TOOL, "apply", exact, pack, "--in-place", "--base", base, "--json"],
        "verify_q4_k_m": [*TOOL, "verify", exact, "--json"],
        "revert_q4_k_m": [*TOOL, "revert", exact, "--json"],
        "cp_q8_0": ["cp", folder / "q8_0.gguf", own],
        "own_rows_q8_0": [*TOOL, "apply", own, pack, "--in-place", "--json"],
        "revert_q8_0": [*TOOL, "revert", own, "--json"],
    }


def one_round(folder: Path, commands: dict[str, list[object]]) -> dict[str, Run]:
    """Each contender once."""
    results = {}
    for name, command in commands.items():
        results[name], said = measure(command)
        if name.startswith("verify") and json.loads(said)["verdict"] != "patched":
            sys.exit(said)
        (folder / "out.gguf").unlink(missing_ok=True)
    for kind in KINDS:
        file = folder / f"work-{kind}.gguf"
        if digest_file(file) != digest_file(folder / f"{kind}.gguf"):
            sys.exit("after revert the file is not what it was")
        for leftover in (file, file.with_name(f"{file.name}.nestpatch.json")):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(file.with_name(f".{file.name}.nestpatch"), ignore_errors=True)
    return results


def main() -> None:
    """Measures, prints the table and the JSON object."""
    parser = options_of(__doc__, QUICK)
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp, whose converter is the peer")
    options = parser.parse_args()
    size = "quick" if options.quick else "1b"
    folder = prepared("bench.gguf", size)
    results = in_rounds(partial(one_round, folder, contenders(folder, options.llama_cpp)), options.rounds)
    forget(folder / "base")
    pairs = [("export_bf16", "cp_model"), ("cp_q4_k_m", "exact_q4_k_m"), ("llama_cpp_bf16", "export_bf16")]
    publish(
        f"GGUF files of {parameters(size) / 1e9:.2f} B parameters",
        f"Whole processes in turn, medians of {options.rounds} rounds after one\nthat was not counted. nestpatch syncs what it"
        " writes, `cp` does not. After every revert the file's SHA-256 was the original.",
        results,
        {"parameters": parameters(size), "rounds": options.rounds, "ratios": ratios_of(results, pairs)},
        log=options.log,
    )


if sys.argv[1:3] == ["--step", "prepare"]:
    prepare(sys.argv[3])
elif __name__ == "__main__":
    main()
