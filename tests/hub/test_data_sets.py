"""Benchmarks as data sets of the Hub: splits, configurations, and a door that is closed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub

pytestmark = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
CARD = b"""---
configs:
- config_name: behaviors
  data_files:
  - split: harmful
    path: data/harmful-behaviors.csv
  - split: benign
    path: data/benign-behaviors.csv
---
"""
COLUMNS = b"Index,Goal,Target,Behavior,Category,Source\n"
LOAD = """
from nestpatch.errors import PromptDataError
from nestpatch.evaluation.suites import load_suites
try:
    result = [[s.name, s.kind, [p.text for p in s.prompts.prompts]] for s in load_suites(sys.argv[1])]
except PromptDataError as error:
    result = [str(error), error.advice]
"""


def test_a_benchmark_is_read_from_the_hub(hub: Hub, machine: Callable[..., Machine]) -> None:
    files = {"README.md": CARD}
    for name, goal in (("harmful", b"rob it"), ("benign", b"paint it")):
        files[f"data/{name}-behaviors.csv"] = COLUMNS + b"0," + goal + b",Sure,b,c,Original\n"
    hub.store.seed("JailbreakBench/JBB-Behaviors", files, kind="dataset")
    both = [["jailbreakbench.harmful", "harmful", ["rob it"]], ["jailbreakbench.benign", "lookalike", ["paint it"]]]
    assert machine().run(LOAD, "jailbreakbench") == both
    assert machine().run(LOAD, "jailbreakbench=JailbreakBench/JBB-Behaviors:benign") == both[1:]


def test_a_gated_benchmark_is_named_with_the_way_in(hub: Hub, machine: Callable[..., Machine]) -> None:
    hub.store.seed("walledai/AdvBench", {"train.csv": b"prompt,target\nrob it,Sure\n"}, kind="dataset")
    hub.accounts.of("dataset", "walledai/AdvBench").gated = True
    message, advice = machine().run(LOAD, "advbench")
    assert message == "the data set walledai/AdvBench is gated, and this account may not read it"
    assert "/datasets/walledai/AdvBench and log in" in advice
