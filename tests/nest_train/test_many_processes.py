"""Two processes train the pack of one, with all of the base each or half of it; when one fails, both end with its message."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import nestpatch
from nestpatch.errors import DataError, OutOfMemoryError, RecipeError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train import _ranks, _shard
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import train
from nestpatch.pack import Label, Pack
from nestpatch.runtimes.sharded import held_bytes
from tests.nest_train.conftest import LLAMA, SIZES
from tests.nest_train.quick import QUICK, options

PACKAGE = Path(nestpatch.__file__).parent.parent
SETTINGS = [*options(QUICK), "--set=check_prompts=2", "--set=probe_batch=16", "--set=refusals=auto", "--device=cpu"]
FAILING = """import os, runpy
if os.environ["RANK"] == "1":
    from nestpatch.errors import OutOfMemoryError
    from nestpatch.runtimes import experts
    def fail(*_):
        raise OutOfMemoryError("the second process has no memory left")
    experts.pad_left = fail
runpy.run_module("nestpatch.nest_train", run_name="__main__")
"""


# Parts of a step differ in size between the processes, and lower layers are not computed.
UNEVEN = ["--set=first_layer=1", "--set=benign_batch=2", "--set=micro_batch=2"]
# Writes for each process how many bytes of the base it held at most while a layer was computed.
MEASURING = """import atexit, os, runpy, sys
from torch.distributed.tensor import DTensor
from nestpatch.nest_train import _run
load, peak = _run.load_model, [0]
def bytes_held(model):
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    shares = [weight.to_local() for weight in frozen if isinstance(weight, DTensor)]
    gathered = {weight.data_ptr(): weight for weight in frozen if not isinstance(weight, DTensor)}.values()
    # Of what is gathered it keeps its share too.
    return sum(weight.nbytes for weight in shares) + sum(weight.nbytes * 3 // 2 for weight in gathered)
def loaded(*given):
    model, tokenizer = load(*given)
    def look(*_):
        peak[0] = max(peak[0], bytes_held(model))
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(look)
    return model, tokenizer
_run.load_model = loaded
place = sys.argv.pop(1)
atexit.register(lambda: open(place + os.environ["RANK"], "w").write(str(peak[0])))
runpy.run_module("nestpatch.nest_train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A model most of which is layers."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **(LLAMA | {"num_hidden_layers": 6}))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def test_two_processes_with_half_of_the_base_each_train_the_pack_of_one(deep: Path, prompts, tmp_path: Path) -> None:
    suites = [f"--suite={prompts / kind}.jsonl" for kind in ("harmful", "benign")]
    single = alone([*arguments(deep, prompts, tmp_path / "one.nest"), *UNEVEN, *suites])
    assert single.returncode == 0, single.stderr
    run = tmp_path / "run"
    (tmp_path / "measuring.py").write_text(MEASURING)
    done = launch(
        ["--", str(tmp_path / "measuring.py"), str(tmp_path / "peak")],
        [
            *(*arguments(deep, prompts, tmp_path / "two.nest"), *UNEVEN, *suites),
            *("--set=shard=on", "--set=checkpointing=on", f"--run={run}", "--json"),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("shard: on (asked for)") == 1
    one, two = nest.read(tmp_path / "one.nest"), nest.read(tmp_path / "two.nest")
    same_but_for_rounding(one, two)
    assert one.manifest.method["layers"] == two.manifest.method["layers"]
    numbers = [pack.manifest.evaluation["after"] for pack in (one, two)]
    assert numbers[0]["kl_to_base"] == pytest.approx(numbers[1]["kl_to_base"], rel=0.02)
    result = json.loads(done.stdout)
    whole = 4 * result["model_parameters"]
    session = json.loads((run / "run.json").read_text())["sessions"][-1]
    assert session["parameter_bytes"] == pytest.approx(whole / 2, rel=0.02)
    for rank in ("0", "1"):  # its half, and what is gathered of the module that is computed
        assert whole / 2 < int((tmp_path / f"peak{rank}").read_text()) < 0.7 * whole


def test_one_process_has_nobody_to_divide_a_base_with(models, data: TrainingData) -> None:
    with pytest.raises(DataError, match="shard=on divides the base between processes, and there is one") as caught:
        train(models("llama"), data, Label("x"), recipe=dataclasses.replace(QUICK, shard="on", device="cpu"))
    assert "torchrun" in caught.value.advice


def test_a_base_in_few_bits_is_not_divided() -> None:
    with pytest.raises(RecipeError, match="shard=on does not divide a base in few bits"):
        Recipe(shard="on", load_in="4bit")


@pytest.mark.parametrize(
    ("settings", "processes", "free", "wanted"),
    [
        ({}, 4, 1000, ("on", "the base does not fit whole beside the rest")),
        ({}, 4, 2000, ("off", "the base fits beside the rest")),
        ({"shard": "off"}, 4, 1000, ("off", "asked for")),
        ({"shard": "on"}, 4, 2000, ("on", "asked for")),
        ({"load_in": "4bit"}, 4, 1000, ("off", "a base in few bits cannot be divided")),
        ({}, 1, 1000, ("off", "one process")),
    ],
)
def test_a_base_is_divided_where_it_does_not_fit(
    settings: dict[str, str], processes: int, free: int, wanted: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shard, "free_on", lambda _: free)
    monkeypatch.setattr(_ranks.HERE, "count", processes)
    assert _shard.choose_shard(Recipe(**settings), "cpu", 1200) == wanted


def test_a_gpu_that_is_too_small_for_a_base_is_an_error_with_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shard, "free_on", lambda _: 80 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"the base takes 141.1 GB, and 80.0 GB are free on the device cuda") as caught:
        _shard.choose_shard(Recipe(), "cuda", 141_107_000_000)
    assert "torchrun" in caught.value.advice


def test_the_bytes_of_a_base_are_those_in_the_arithmetic(models) -> None:
    checkpoint = open_checkpoint(models("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.bfloat16)
    assert _shard.base_bytes(checkpoint, "bfloat16") == 2 * model.num_parameters() == held_bytes(model)
    assert _shard.base_bytes(checkpoint, "float32") == 4 * model.num_parameters()


def test_the_failure_of_one_process_ends_both_with_its_message(models, prompts, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = launch([str(tmp_path / "failing.py")], [*arguments(models("llama"), prompts, tmp_path / "x.nest"), "--no-eval"])
    assert done.returncode == 1
    assert done.stderr.count("OutOfMemoryError") == 1
    assert "the second process has no memory left" in done.stderr
    assert "another process" not in done.stderr
    assert not (tmp_path / "x.nest").exists()
