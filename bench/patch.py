"""What patching costs, beside copying the model and merging otherwise: `python -m bench.patch [--size 1b|3b] [--quick]`.

Every contender is a whole process. They take turns, with a warm page cache: a first round is not counted. Before each one all
dirty pages are written out, so that none pays for the one before. The last line of stdout is one JSON object. Peers that are
installed are measured too (bench/peers.py); models of 8 and 70 billion parameters are `bench.large`'s.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

from bench import readme
from bench._floor import build_floor, write_job
from bench.harness import TOOL, Run, digest_file, in_rounds, measure, options_of, prepared, publish, ratios_of
from bench.model import QUICK, cached_model, forget, parameters
from bench.peers import absent, peers_of, prepare_peers

DENSE = ("1b", "3b")
PAIRS = (
    ("in_place", "floor_apply"),
    ("revert", "floor_revert"),
    ("script", "in_place"),
    ("peft", "in_place"),
    ("mergekit", "in_place"),
    ("export_lora", "in_place_gguf"),
    ("peft", "copy"),
    ("cp", "in_place"),
    ("copy_no_sync", "cp"),
    ("copy", "cp_sync"),
)
"""Ratios of times that are shown."""
_KEPT = ("in_place", "verify", "in_place_gguf")
"""After these the state beside the model is needed once more."""


def prepare(size: str) -> None:
    """Makes base/, patch.nest and what the contenders need where it is missing, and prints their folder."""
    folder = cached_model(size)
    prepare_peers(folder)
    if build_floor(folder) is not None:
        write_job(folder / "base" / "model.safetensors", folder / "patch.nest", folder / "floor.job")
        (folder / "kept").mkdir(exist_ok=True)
    print(folder)


def contenders(folder: Path) -> dict[str, list[object]]:
    """Name -> command, in the order of a round."""
    model, pack, out = folder / "base", folder / "patch.nest", folder / "out"
    found: dict[str, list[object]] = {}
    if (folder / "floor").is_file():
        job = [folder / "floor.job", model / "model.safetensors", folder / "kept"]
        found = {f"floor_{what}": [folder / "floor", what, *job] for what in ("apply", "revert")}
    return found | {
        "in_place": [*TOOL, "apply", model, pack, "--in-place", "--json"],
        "verify": [*TOOL, "verify", model, "--json"],
        "revert": [*TOOL, "revert", model, "--json"],
        "copy": [*TOOL, "apply", model, pack, "-o", out, "--json"],
        "copy_no_sync": [*TOOL, "apply", model, pack, "-o", out, "--json", "--no-sync"],
        "cp": ["cp", "-r", model, out],
        "cp_sync": ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", model, out],
        **peers_of(folder),
    }


def one_round(folder: Path, commands: dict[str, list[object]]) -> dict[str, Run]:
    """Each contender once. Outputs and what nestpatch keeps are removed, so that each apply is a first one."""
    results = {}
    for name, command in commands.items():
        results[name], said = measure(command)
        if name == "verify" and json.loads(said)["verdict"] != "patched":
            sys.exit(said)
        if name not in _KEPT:
            forget(folder / "base")
            forget(folder / "bf16.gguf")
        clear(folder)
    return results


def clear(folder: Path) -> None:
    """Removes what contenders have written."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out.gguf").unlink(missing_ok=True)


def measure_all(size: str, rounds: int) -> dict[str, Run]:
    """The medians of the rounds that count."""
    folder = prepared("bench.patch", size)
    clear(folder)
    results = in_rounds(partial(one_round, folder, contenders(folder)), rounds)
    if digest_file(folder / "base" / "model.safetensors") != (folder / "base.sha256").read_text():
        sys.exit("after revert the model is not what it was")
    return results


def main() -> None:
    """Measures, prints the table and the JSON object."""
    parser = options_of(__doc__, QUICK | readme.OPTION)
    parser.add_argument("--size", choices=DENSE, default=DENSE[0], help="billions of parameters")
    options = parser.parse_args()
    size = "quick" if options.quick else options.size
    results = measure_all(size, options.rounds)
    print(*absent(), sep="\n")
    publish(
        f"patching {parameters(size) / 1e9:.2f} B parameters",
        f"Whole processes in turn, medians of {options.rounds} rounds, page cache\nwarm after a round that was not counted. The"
        " nestpatch commands sync what they write, and `cp_sync`; `copy_no_sync`,\n`cp` and the peers do not. After revert the"
        " model's SHA-256 was the original.",
        results,
        {"parameters": parameters(size), "rounds": options.rounds, "ratios": ratios_of(results, PAIRS)},
        log=options.log,
    )
    if options.readme:
        readme.keep(size, results, parameters=parameters(size), rounds=options.rounds)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--step", "prepare"]:
        prepare(sys.argv[3])
    else:
        main()
