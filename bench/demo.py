"""The demo for several seeds: `python -m bench.demo [--lab] [--seeds 0 1 2]`.

Prints a line per seed; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from nestpatch.evaluation.shares import HEADLINES


def run(seed: int, options: list[str]) -> dict:
    """One whole process, as a user starts it."""
    command = [sys.executable, "-m", "nestpatch", "demo", *options, "--json", "--quiet", "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lab", action="store_true", help="the lab's model")
    arguments, results = parser.parse_args(), []
    for seed in arguments.seeds:
        result = run(seed, ["--lab"] if arguments.lab else [])
        results.append(result)
        share = result["trained_parameters"] / result["model_parameters"]
        measured = [name for name in HEADLINES if result["after"][name] is not None]
        sides = {name: (result["before"][name]["value"], result["after"][name]["value"]) for name in measured}
        numbers = "  ".join(f"{name} {before:.3f} -> {after:.3f}" for name, (before, after) in sides.items())
        print(f"seed {seed}: {numbers}  trained {share:.2%}  pack {result['bytes']} B  {result['stages']}")
    medians = {name: statistics.median(r["after"][name]["value"] for r in results) for name in sides}
    print(json.dumps({"seeds": {r["seed"]: r for r in results}, "median_after": medians}))


if __name__ == "__main__":
    main()
