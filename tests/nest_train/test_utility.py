"""What a patch may cost: perplexity in every runtime, answers as the base's, tasks of lm-eval."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import DataError, EvaluationTaskError
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.limits import exceeded
from nestpatch.evaluation.perplexity import WINDOW, TextLoss, load_texts, text_loss
from nestpatch.evaluation.scores import Scores
from nestpatch.evaluation.suites import load_suite
from nestpatch.evaluation.tasks import TaskScore, largest_fall
from nestpatch.formats import nest
from nestpatch.runtimes.protocol import open_runtime
from tests.gguf_files import needs_llama, write_gguf
from tests.schemas import require_schema
from tests.varied_packs import varied_pack

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
TEXT = "The fence is painted in spring. Poison is kept in the shed, far from the bank. " * 20
UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


@pytest.fixture(scope="module")
def base(models):
    return models("llama")


@pytest.fixture(scope="module")
def made(base):
    return varied_pack(base, UP, scale=1.0)


@pytest.fixture
def benign(tmp_path):
    file = tmp_path / "benign.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"Tell me how to paint fence {i}."}) for i in range(4)))
    return file


@pytest.fixture
def prose(tmp_path):
    (tmp_path / "prose.txt").write_text(TEXT)
    return tmp_path / "prose.txt"


def run(*words: object):
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def test_the_perplexity_is_that_of_pytorch(base):
    """Windows that do not overlap, as long as the model's context; the first token of each is not predicted."""
    with open_runtime(base, device="cpu", dtype="float32") as model:
        found = text_loss(model, [TEXT, "The fence."])
        losses = []
        for text in (TEXT, "The fence."):
            for part in torch.tensor(model.tokenizer(text)["input_ids"]).split(256):
                with torch.inference_mode():
                    logits = model.model(part[None]).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    assert model.context == 256 < WINDOW
    assert len(losses) > 3
    assert found.tokens == sum(map(len, losses))
    assert found.perplexity == pytest.approx(math.exp(torch.cat(losses).mean().item()), rel=1e-5)


@needs_llama
def test_llama_cpp_predicts_the_same_text_as_well(base, made, tmp_path):
    file = write_gguf(base, tmp_path / "m.gguf")
    with open_runtime(base, device="cpu", dtype="float32") as model, open_runtime(file) as other:
        assert other.context == model.context
        assert other.text_ids(TEXT) == model.text_ids(TEXT)
        assert text_loss(other, [TEXT]).nats == pytest.approx(text_loss(model, [TEXT]).nats, rel=1e-4)
        with other.with_pack(made) as patched:
            changed = text_loss(patched, [TEXT]).beside(text_loss(other, [TEXT]))
    assert changed.rise != 0


def test_utility_is_in_the_table_in_json_and_in_limits(base, made, benign, prose, tmp_path):
    nest.write(made, tmp_path / "x.nest")
    words = (base, tmp_path / "x.nest", f"--suite={benign}", "--text", prose, "--max-new-tokens=4")
    done = run(*words, "--json", "--fail-over=perplexity_rise=0.5", "--fail-under=answer_agreement=0.5")
    found = json.loads(done.stdout)
    require_schema(found, "eval")
    before, after = found["before"], found["after"]
    assert (before["answer_agreement"], before["text"]["perplexity_rise"], before["tasks"]) == (None, None, None)
    rise = after["text"]["perplexity"] / before["text"]["perplexity"] - 1
    assert after["text"]["perplexity_rise"] == pytest.approx(rise, abs=1e-5)
    assert after["text"]["tokens"] == before["text"]["tokens"] > WINDOW
    both = evaluate(base, [load_suite(str(benign))], pack=made, max_new_tokens=4)
    same = sum(
        a.answer == b.answer for a, b in zip(both.model.suites[0].verdicts, both.patched.suites[0].verdicts, strict=True)
    )
    assert (after["answer_agreement"]["count"], after["answer_agreement"]["total"]) == (same, 4)
    assert same < 4, "the pack changes what is asked"
    wanted = {rise > 0.5: "perplexity_rise is", same < 2: "answer_agreement is"}
    assert [text in done.stderr for text in wanted.values()] == list(wanted)
    shown = run(*words, "--quiet").stdout
    assert f"{before['text']['tokens']:,} tokens" in shown
    assert "answers as the base's" in shown


def test_a_base_is_compared_with_too(base, benign, prose):
    found = evaluate(base, [load_suite(str(benign))], base=base, texts=load_texts([prose]), max_new_tokens=3).model
    assert (found.agreement.count, found.agreement.total, found.text.rise) == (4, 4, 0)
    alone = evaluate(base, [load_suite(str(benign))], texts=load_texts([prose]), max_new_tokens=3).model
    assert (alone.agreement, alone.text.rise) == (None, None)
    assert exceeded(found, {"perplexity_rise": 0.0}, {"answer_agreement": 1.0}) == ()


def test_a_number_that_is_not_measured_cannot_be_a_limit(base, benign, prose):
    for words in (["--fail-over=perplexity_rise=0.1", "--text", prose], ["--base", base, "--fail-over=perplexity_rise=0.1"]):
        done = run(base, f"--suite={benign}", *words)
        assert done.exit_code == 2
        assert "perplexity_rise is not measured here" in done.stderr


@pytest.mark.parametrize(("content", "says"), [(None, "does not exist"), (b" \n", "is empty"), (b"\xff\xfe", "cannot read")])
def test_a_text_that_is_none_is_named_before_any_work(base, benign, tmp_path, monkeypatch, content, says):
    monkeypatch.setattr("nestpatch.evaluation.evaluator.open_runtime", lambda *_, **__: pytest.fail("a model was loaded"))
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    done = run(base, f"--suite={benign}", "--text", tmp_path / "x.txt")
    assert (done.exit_code, says in done.stderr) == (2, True), done.output


def test_one_token_is_no_text(base):
    with open_runtime(base, device="cpu") as model, pytest.raises(DataError, match="no token to predict"):
        text_loss(model, ["."])


def test_a_rise_is_relative():
    assert TextLoss(20.0, 10).beside(TextLoss(10.0, 10)).rise == pytest.approx(math.e - 1)
    assert TextLoss(1e6, 10).perplexity == math.inf


# Tasks of lm-eval

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["paint", "poison"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path):
    rows = [{"question": f"What is done to fence {i}?", "answer": i % 2} for i in range(6)]
    (tmp_path / "fences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "fences.yaml").write_text(TASK.format(name="nestpatch_fences", data=tmp_path / "fences.jsonl"))
    return tmp_path / "fences.yaml"


@needs_lm_eval
def test_a_task_runs_before_and_after_the_pack(base, made, benign, task, tmp_path):
    nest.write(made, tmp_path / "x.nest")
    words = (base, tmp_path / "x.nest", f"--suite={benign}", "--max-new-tokens=2", "--task", task, "--task-limit=5")
    done = run(*words, "--json", "--quiet", "--fail-over=task_fall=1")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    require_schema(found, "eval")
    for scores in (found["before"], found["after"]):
        (metric,) = scores["tasks"]["nestpatch_fences"]
        assert (metric["metric"], metric["samples"], metric["higher_is_better"]) == ("acc,none", 5, True)
        assert metric["value"] * 5 == pytest.approx(round(metric["value"] * 5))


@needs_lm_eval
def test_a_task_that_fails_is_named(base, benign, task, tmp_path):
    (tmp_path / "fences.jsonl").unlink()
    with pytest.raises(EvaluationTaskError, match="lm-eval cannot run nestpatch_fences"):
        evaluate(base, [load_suite(str(benign))], tasks=[str(task)], max_new_tokens=2)


@needs_lm_eval
def test_a_file_without_a_task_is_named(base, benign, task, tmp_path):
    (tmp_path / "other.yaml").write_text("group: fences\n")
    for file, says in (("other.yaml", "does not define a task"), ("none.yaml", "cannot read the task")):
        with pytest.raises(DataError, match=says):
            evaluate(base, [load_suite(str(benign))], tasks=[str(tmp_path / file)])


def test_tasks_run_in_transformers_alone(benign, tmp_path):
    with pytest.raises(DataError, match="tasks of lm-eval run in transformers"):
        evaluate(tmp_path / "m.gguf", [load_suite(str(benign))], tasks=["gsm8k"])


def test_the_largest_fall_is_of_metrics_of_which_more_is_better():
    def scores(acc: float, loss: float) -> list[TaskScore]:
        return [TaskScore("t", "acc,none", acc, None, 9, True), TaskScore("t", "loss,none", loss, None, 9, False)]

    assert largest_fall(scores(0.75, 9), scores(0.5, 1)) == 0.25
    assert largest_fall(scores(0.5, 9), scores(0.75, 1)) == 0
    assert largest_fall([], []) is None


def test_a_fall_that_is_not_a_number_keeps_no_limit():
    before = [TaskScore("t", metric, 0.5, None, 9, True) for metric in ("acc", "f1", "em")]
    after = [TaskScore("t", metric, value, None, 9, True) for metric, value in (("acc", 0.5), ("f1", math.nan), ("em", 0.4))]
    fall = largest_fall(before, after)
    assert math.isnan(fall)
    assert len(exceeded(Scores((), task_fall=fall), {"task_fall": 1.0}, {})) == 1
