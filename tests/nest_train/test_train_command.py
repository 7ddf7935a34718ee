"""The command that trains, and what a training checks, reports and leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import DataError, OutputError
from nestpatch.evaluation.suites import load_suite
from nestpatch.events import Event
from nestpatch.formats import nest
from nestpatch.nest_train import _evaluate as module
from nestpatch.nest_train.plan import plan
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.prompts.readers import load_prompts
from tests.nest_train.quick import KINDS, QUICK, options, write_prompts
from tests.schemas import require_schema


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test prompts of every kind; no prompt is in both."""
    return write_prompts(tmp_path_factory.mktemp("prompts"), 30)


@pytest.fixture(scope="module")
def data(prompts: Path) -> nestpatch.TrainingData:
    return nestpatch.TrainingData(*(load_prompts(prompts / f"{kind}.jsonl") for kind in KINDS))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def arguments(base: Path, prompts: Path, output: Path) -> list[str]:
    sets = [f"--{kind}={prompts / kind}.jsonl" for kind in KINDS]
    return ["train", str(base), *sets, "-o", str(output), *options()]


def test_a_harmful_suite_alone_is_measured_alone(models, prompts: Path, tmp_path: Path) -> None:
    pack = tmp_path / "x.nest"
    done = run(*arguments(models("llama"), prompts, pack), "--suite", prompts / "harmful-test.jsonl", "--json", "-q")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    require_schema(facts, "train")
    assert facts["after"]["attack_success"]["total"] == 6
    assert facts["after"].get("refusal_benign") is None
    assert facts["after"].get("kl_to_base") is None
    assert "not measured: refusals of benign prompts, refusals of look-alike prompts" in facts["warnings"]
    assert nest.read(pack).manifest.evaluation["after"]["attack_success"]["total"] == 6


def test_the_last_screen_has_the_pack_the_numbers_and_the_next_command(models, prompts: Path, tmp_path: Path) -> None:
    pack, base = tmp_path / "no harm.nest", models("llama")
    done = run(*arguments(base, prompts, pack), "--name=no-harm", "--suite", prompts / "harmful-test.jsonl", "-q")
    assert done.exit_code == 0, done.output
    assert f"no-harm 1.0.0  {pack}" in done.stdout
    assert "of 6" in next(line for line in done.stdout.splitlines() if line.startswith("attack success"))
    assert "not measured" in next(line for line in done.stdout.splitlines() if line.startswith("refusals, benign"))
    assert "not measured" in next(line for line in done.stdout.splitlines() if line.startswith("KL to the base"))
    assert f"next: nestpatch apply {base} '{pack}' -o PATCHED" in done.stdout
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]
    assert any("attack success was measured on 6 prompts only" in line for line in warnings), done.stderr


def fail_after_training(monkeypatch: pytest.MonkeyPatch, pack: Path, error: BaseException, at: int = 2) -> list[bool]:
    """One evaluation fails, 1 being that of the base and 2 that of the pack; says whether the pack was there by then."""
    calls: list[bool] = []
    original = module.evaluate_suites

    def evaluate(generate: Any, suites: Any) -> Any:
        calls.append(pack.exists())
        if len(calls) == at:
            raise error
        return original(generate, suites)

    monkeypatch.setattr(module, "evaluate_suites", evaluate)
    return calls


def test_an_evaluation_that_fails_leaves_the_pack(
    models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = tmp_path / "x.nest"
    calls = fail_after_training(monkeypatch, pack, RuntimeError("out of memory"))
    done = run(*arguments(models("llama"), prompts, pack), "--suite", prompts / "harmful-test.jsonl", "-q")
    assert (done.exit_code, calls) == (1, [False, True])
    assert "could not be evaluated: RuntimeError: out of memory" in done.stderr
    assert "WARNING: nothing was measured" in done.stderr
    assert f"nestpatch eval {models('llama')} {pack}" in done.stderr
    assert str(pack) in done.stdout
    evaluation = nest.read(pack).manifest.evaluation
    assert evaluation["after"] is None
    assert evaluation["before"]["attack_success"]["total"] == 6


def test_a_dose_curve_that_fails_leaves_the_evaluated_pack(
    models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = tmp_path / "x.nest"
    fail_after_training(monkeypatch, pack, RuntimeError("out of memory"), at=3)
    words = (*arguments(models("llama"), prompts, pack), "--suite", prompts / "harmful-test.jsonl", "--dose=0.5,1.5", "-q")
    done = run(*words)
    assert done.exit_code == 1
    assert "its dose curve could not be measured: RuntimeError: out of memory" in done.stderr
    assert "--strength=0,0.5,1,1.5" in done.stderr
    evaluation = nest.read(pack).manifest.evaluation
    assert evaluation["after"]["attack_success"]["total"] == 6
    assert "dose" not in evaluation


def test_an_interrupted_evaluation_leaves_the_pack(
    models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = tmp_path / "x.nest"
    fail_after_training(monkeypatch, pack, KeyboardInterrupt())
    done = run(*arguments(models("llama"), prompts, pack), "--suite", prompts / "harmful-test.jsonl")
    assert done.exit_code == 130
    assert f"wrote {pack}; its evaluation follows" in done.stderr
    assert nest.read(pack).label == "x 1.0.0"


def test_suites_that_were_trained_on_are_named(models, data, prompts: Path) -> None:
    notes: list[str] = []
    suites = [load_suite(str(prompts / f"{name}.jsonl")) for name in ("harmful", "harmful-test")]
    trained = train(models("llama"), data, Label("x"), recipe=QUICK, suites=suites, on_event=lambda e: notes.append(e.note))
    assert trained.pack.manifest.evaluation["seen_in_training"] == {"harmful": 30}
    assert any("30 prompts of suite harmful were also trained on" in text for text in trained.warnings)
    assert any(note.startswith("suites with training prompts: harmful;") for note in notes)


def test_the_result_as_json(models, data, tmp_path: Path) -> None:
    trained = train(models("llama"), data, Label("x"), recipe=QUICK)
    facts = trained.as_json()
    assert facts == {
        "output": None,
        "pack": "x 1.0.0",
        "pack_id": nest.pack_id(trained.pack),
        "bytes": len(nest.encode(trained.pack)),
        "trained_parameters": trained.pack.parameters,
        "model_parameters": trained.model_parameters,
        "before": None,
        "after": None,
        "warnings": ["nothing was measured: the pack was not evaluated after it was trained"],
        "problem": None,
        "dose": None,
        "recommended": None,
    }
    again = train(models("llama"), data, Label("x"), recipe=QUICK, output=tmp_path / "x.nest")
    assert again.as_json()["output"] == str(tmp_path / "x.nest")
    assert [d.delta.tobytes() for d in nest.read(tmp_path / "x.nest")] == [d.delta.tobytes() for d in trained.pack]


def test_every_step_reports_its_loss(models, data) -> None:
    events: list[Event] = []
    train(models("llama"), data, Label("x"), recipe=QUICK, on_event=events.append)
    steps = [event for event in events if event.stage == "tune" and event.done]
    assert [event.done for event in steps] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {event.total for event in steps} == {6}
    looks = [event.note.startswith("held-out loss ") for event in steps]
    assert looks == [False, False, False, True, False, False, False, True]
    assert all(event.note.startswith("loss ") for event, look in zip(steps, looks, strict=True) if not look)


def test_threads_are_limited_while_it_trains(models, data) -> None:
    before = torch.get_num_threads()
    seen = set()

    def listen(event: Event) -> None:
        if event.stage == "tune":
            seen.add(torch.get_num_threads())

    train(models("llama"), data, Label("x"), recipe=QUICK, threads=1, on_event=listen)
    assert (seen, torch.get_num_threads()) == ({1}, before)
    with pytest.raises(DataError, match="threads must be at least 1"):
        train(models("llama"), data, Label("x"), recipe=QUICK, threads=0)


def test_nothing_is_loaded_for_a_training_that_cannot_end(data, tmp_path: Path) -> None:
    """The base does not exist: every one of these is found before it is looked for."""
    nowhere = tmp_path / "nowhere"
    (tmp_path / "taken.nest").touch()
    with pytest.raises(DataError, match="not a pack name"):
        train(nowhere, data, Label("a/b"))
    with pytest.raises(OutputError, match="exists already"):
        train(nowhere, data, Label("x"), output=tmp_path / "taken.nest")
    with pytest.raises(DataError, match="both harmful and harmless"):
        train(nowhere, nestpatch.TrainingData(data.harmful, data.harmful), Label("x"))


def test_a_dry_run_plans_and_writes_nothing(models, data, prompts: Path, tmp_path: Path) -> None:
    pack, base = tmp_path / "x.nest", models("phi3")
    files = sorted(base.iterdir())
    command = [*arguments(base, prompts, pack), "--suite", prompts / "harmful-test.jsonl", "--dry-run", "-q"]
    planned = json.loads(run(*command, "--json").stdout)
    require_schema(planned, "train --dry-run")
    assert planned["model"] == str(base)
    assert (planned["output"], planned["dry_run"], planned["architecture"]) == (str(pack), True, "Phi3ForCausalLM")
    assert (planned["layers"], planned["neurons"], planned["steps"]) == (2, 128, 6)
    assert planned["prompts"] == {"harmful": 30, "benign": 30, "lookalike": 30}
    assert (planned["suite_prompts"], planned["seen_in_training"]) == (6, {})
    assert set(planned["stages"]) == {"load", "distil", "evaluate", "probe", "select and cluster", "remember", "tune"}
    assert abs(planned["seconds"] - sum(planned["stages"].values())) < 0.5
    # Every layer has between 6 and 10 clusters of deltas for gate and up, 32 wide.
    assert 2 * 6 * 2 * 32 <= planned["trained_parameters"] <= 2 * 10 * 2 * 32
    shown = run(*command)
    assert shown.exit_code == 0, shown.output
    for text in (f"would write {pack}", "2 feed-forward blocks with 128 neurons", "6 prompts, before and after", "in 6 steps"):
        assert text in shown.stdout
    assert not pack.exists()
    assert sorted(base.iterdir()) == files


def test_a_plan_warns_of_suites_that_are_trained_on(models, prompts: Path, tmp_path: Path) -> None:
    suites = [f"--suite={prompts / name}.jsonl" for name in ("harmful", "harmful-test")]
    shown = run(*arguments(models("llama"), prompts, tmp_path / "x.nest"), *suites, "--dry-run", "-q")
    assert "30 prompts of suite harmful are also training prompts" in shown.stdout
    assert "suite harmful-test" not in shown.stdout


def test_planning_does_not_change_what_is_trained(models, data) -> None:
    alone = train(models("llama"), data, Label("x"), recipe=QUICK)
    plan(models("llama"), data, recipe=QUICK)
    after = train(models("llama"), data, Label("x"), recipe=QUICK)
    assert [d.delta.tobytes() for d in alone.pack] == [d.delta.tobytes() for d in after.pack]


def test_the_device_option_is_the_setting_and_no_eval_measures_nothing(models, prompts: Path, tmp_path: Path) -> None:
    pack = tmp_path / "x.nest"
    done = run(*arguments(models("llama"), prompts, pack), "--no-eval", "--device", "cpu", "--threads", "1", "-q")
    assert done.exit_code == 0, done.output
    assert nest.read(pack).manifest.method["recipe"]["device"] == "cpu"
    assert nest.read(pack).manifest.evaluation == {}


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--set", "step=3"], 2, "Did you mean steps?"),
        (["--name", "a/b"], 2, "not a pack name"),
        (["--threads", "0"], 2, "--threads"),
        (["--suite", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    ],
)
def test_bad_options_are_named_before_the_model_is_opened(
    prompts: Path, tmp_path: Path, more: list[str], code: int, says: str
) -> None:
    (tmp_path / "nothing").mkdir()
    done = run(*arguments(tmp_path / "nothing", prompts, tmp_path / "x.nest"), *more)
    assert done.exit_code == code, done.output
    assert says in done.stderr


@pytest.mark.parametrize("module", ["torch", "sklearn"])
def test_without_the_extra_training_ends_at_once(tmp_path: Path, module: str) -> None:
    """Not one prompt file is opened: none of them exists."""
    (tmp_path / "nothing").mkdir()
    base, output = str(tmp_path / "nothing"), str(tmp_path / "x.nest")
    command = ["train", base, "--harmful", "a.jsonl", "--benign", "b.jsonl", "-o", output]
    code = f"import sys; sys.modules[{module!r}] = None\nfrom nestpatch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"MissingExtraError: training (module {module})" in done.stderr
    assert "pip install 'nestpatch[train]'" in done.stderr


def test_in_python_too_the_extra_is_named_before_any_work() -> None:
    """Settings, labels and prompts are usable without torch; training names what to install."""
    code = """import sys
sys.modules["torch"] = None
import nestpatch
from nestpatch.errors import MissingExtraError
few = nestpatch.PromptSet("few", ())
try:
    nestpatch.train("nowhere", nestpatch.TrainingData(few, few), nestpatch.Label("a/b"), recipe=nestpatch.Recipe(steps=3))
except MissingExtraError as error:
    print(error, error.advice)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'nestpatch[train]'" in done.stdout
