"""Patching models of 8 and 70 billion parameters: `python -m bench.large [--size 8b 70b] [--format safetensors gguf]`.

Time and memory of apply, verify, update and revert on sparse files (bench/sparse.py): safetensors shards, and a GGUF file of
type Q4_K_M that is patched exactly. Whole processes; the update comes from the local Hub of the tests. Checking the models has
just read the touched rows, so that the page cache is warm. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import readme
from bench.harness import TOOL, Run, measure_apart, medians, options_of, prepared, publish
from bench.model import forget, parameters
from bench.sparse import GGUF, VERSIONS, cached_sparse, digest_data, weight_files
from bench.update import REPO, local_hub

SIZES = ("8b", "70b")
FORMATS = ("safetensors", "gguf")


def prepare(size: str) -> None:
    """Makes the model, and prints its folder."""
    print(cached_sparse(size))


def run(*words: object) -> tuple[Run, str]:
    """One command of nestpatch. The Hub of the tests is in this process, so it is measured from another one."""
    return measure_apart([*TOOL, *words])


def first_three(model: Path, pack: Path, base: Sequence[object]) -> dict[str, Run]:
    """Apply, verify and revert, of a pack file on a machine that trusts no key."""
    results = {"in_place": run("apply", model, pack, "--in-place", "--json", *base)[0]}
    results["verify"], said = run("verify", model, "--json")
    if json.loads(said)["verdict"] != "patched":
        sys.exit(said)
    results["revert"] = run("revert", model, "--json")[0]
    forget(model)
    return results


def update_once(model: Path, packs: Path, base: Sequence[object]) -> Run:
    """The update of a model that has the first version, from a Hub that has the second one."""
    with tempfile.TemporaryDirectory() as name, local_hub(Path(name)):
        folder = Path(name)
        first, second = (Path(shutil.copy(packs / f"{version}.nest", folder)) for version in VERSIONS)
        run("keygen", folder / "acme", "--no-password")
        run("trust", "add", folder / "acme.pub")
        for pack in (first, second):
            run("push", pack, REPO, "--key", folder / "acme.key")
        run("sign", first, "--key", folder / "acme.key")
        run("apply", model, first, "--in-place", "--quiet", *base)
        taken, said = run("update", model, "--channel", REPO, "--quiet", "--json", *base)
        if VERSIONS[1] not in said:
            sys.exit(said)
        run("revert", model, "--quiet")
    forget(model)
    return taken


def measure_all(size: str, formats: Sequence[str], rounds: int, *, updates: bool) -> dict[str, Run]:
    """The medians of the rounds; after them the files hold what they held before."""
    folder = prepared("bench.large", size)
    base, results = folder / "base", {}
    for kind in formats:
        model, options = (base, []) if kind == "safetensors" else (folder / GGUF, ["--base", base])
        done = []
        for _ in range(rounds):
            done.append(first_three(model, folder / f"{VERSIONS[0]}.nest", options))
            if updates:
                done[-1]["update"] = update_once(model, folder, options)
        prefix = "" if kind == "safetensors" else f"{kind}_"
        results |= {prefix + name: medians([one[name] for one in done]) for name in done[0]}
    if digest_data(weight_files(folder)) != (folder / "base.sha256").read_text():
        sys.exit("after revert the model is not what it was")
    return results


def main() -> None:
    """Measures, prints the tables and the JSON object."""
    parser = options_of(__doc__, readme.OPTION, rounds=1)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=SIZES, help="billions of parameters")
    parser.add_argument("--format", choices=FORMATS, nargs="+", default=FORMATS, help="of the files")
    parser.add_argument("--no-update", action="store_true", help="leave out the update, the longest step")
    options = parser.parse_args()
    for size in options.size:
        results = measure_all(size, options.format, options.rounds, updates=not options.no_update)
        facts = {"parameters": parameters(size), "rounds": options.rounds}
        publish(
            f"patching {parameters(size) / 1e9:.1f} B parameters in sparse files",
            f"Whole processes, medians of {options.rounds}, page cache warm.\nEvery command syncs what it writes. After the"
            " reverts the files' data had the digest of before.",
            results,
            facts,
            log=options.log,
        )
        if options.readme:
            readme.keep(size, results, **facts)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--step", "prepare"]:
        prepare(sys.argv[3])
    else:
        main()
