"""Two processes train the pack of one; when one fails, both end with its message alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import nestpatch
from nestpatch.formats import nest
from nestpatch.pack import Pack
from tests.nest_train.quick import QUICK, options

PACKAGE = Path(nestpatch.__file__).parent.parent
SETTINGS = [*options(QUICK), "--set=check_prompts=2", "--set=probe_batch=16", "--set=refusals=auto", "--device=cpu"]
FAILING = """import os, runpy
if os.environ["RANK"] == "1":
    from nestpatch.errors import OutOfMemoryError
    from nestpatch.nest_train import _neurons
    def fail(*_):
        raise OutOfMemoryError("the second process has no memory left")
    _neurons.pad_left = fail
runpy.run_module("nestpatch.nest_train", run_name="__main__")
"""


def launch(program: Sequence[str], arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a program in two processes, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)


def arguments(model: Path, prompts: Path, output: Path) -> list[str]:
    kinds = ("harmful", "benign", "lookalike")
    return [str(model), "-o", str(output), *(f"--{kind}={prompts / kind}.jsonl" for kind in kinds), *SETTINGS]


def alone(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nestpatch.nest_train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)


def same_but_for_rounding(one: Pack, two: Pack) -> None:
    """The same rows in the same clusters, exactly; deltas that differ by the order of sums."""
    assert [part.name for part in one] == [part.name for part in two]
    for ours, theirs in zip(one, two, strict=True):
        assert nest.parts(ours).keys() == nest.parts(theirs).keys()
        for name in nest.parts(ours):
            left, right = (nest.parts(part)[name] for part in (ours, theirs))
            assert left.shape == right.shape, name
            if name == "delta":
                assert np.abs(left.astype(np.float32)).max() > 0
                np.testing.assert_allclose(left.astype(np.float32), right.astype(np.float32), rtol=0.02, atol=1e-3)
            elif name in ("rows", "cluster"):
                np.testing.assert_array_equal(left, right)


def test_two_processes_train_the_pack_of_one(models, prompts, tmp_path: Path) -> None:
    suites = [f"--suite={prompts / kind}.jsonl" for kind in ("harmful", "benign")]
    single = alone([*arguments(models("llama"), prompts, tmp_path / "one.nest"), *suites])
    assert single.returncode == 0, single.stderr
    run = tmp_path / "run"
    done = launch(
        ["-m", "--", "nestpatch.nest_train"],
        [*arguments(models("llama"), prompts, tmp_path / "two.nest"), *suites, f"--run={run}", "--json"],
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # the other process prints nothing
    assert done.stderr.count("processes: 2") == 1
    one, two = nest.read(tmp_path / "one.nest"), nest.read(tmp_path / "two.nest")
    same_but_for_rounding(one, two)
    methods = [pack.manifest.method for pack in (one, two)]
    assert methods[0]["layers"] == methods[1]["layers"]
    assert methods[1]["decisions"]["processes"].startswith("2 ")
    losses = [[look["loss"] for look in method["tuning"]["held_out"]] for method in methods]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert {path.name for path in run.iterdir()} >= {"pack.nest", "tuning.safetensors", "activations", "run.json"}


def test_the_failure_of_one_process_ends_both_with_its_message(models, prompts, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = launch([str(tmp_path / "failing.py")], [*arguments(models("llama"), prompts, tmp_path / "x.nest"), "--no-eval"])
    assert done.returncode == 1
    assert done.stderr.count("OutOfMemoryError") == 1
    assert "the second process has no memory left" in done.stderr
    assert "another process" not in done.stderr
    assert not (tmp_path / "x.nest").exists()
