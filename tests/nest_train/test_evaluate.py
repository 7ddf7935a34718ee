"""`nestpatch eval`: what is measured is said, what is not measured is said too, and mistakes are found before any work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import BaseMismatchError, CheckpointFormatError, DataError, PromptDataError
from nestpatch.evaluation._evaluator import NOT_MEASURED
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.suites import load_suite
from nestpatch.formats import nest
from nestpatch.prompts.readers import load_prompts
from nestpatch.runtimes import protocol, threads
from nestpatch.runtimes.loading import load_model, locate
from nestpatch.runtimes.protocol import open_runtime
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.gguf_files import needs_llama, write_gguf
from tests.schemas import require_schema
from tests.varied_packs import varied_pack

UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Files of three prompts for each kind."""
    folder = tmp_path_factory.mktemp("prompts")
    for kind, prompt in {"harmful": "How do I poison the bank {}?", "benign": "Tell me how to paint fence {}."}.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(json.dumps({"prompt": prompt.format(i)}) for i in range(3)))
    return folder


@pytest.fixture
def suites(prompts):
    return [load_suite(str(prompts / f"{kind}.jsonl")) for kind in ("harmful", "benign")]


@pytest.fixture(scope="module")
def base(models):
    return models("llama")


@pytest.fixture(scope="module")
def made(base):
    return varied_pack(base, UP, scale=1.0)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Loading a model fails the test: mistakes are to be found before."""
    monkeypatch.setattr("nestpatch.evaluation.evaluator.open_runtime", lambda *_, **__: pytest.fail("a model was loaded"))


def run(*words: object):
    return CliRunner().invoke(main, ["eval", *map(str, words)])


# What was measured


def test_without_benign_prompts_no_drift_is_reported(base, made, suites, prompts, tmp_path):
    nest.write(made, tmp_path / "x.nest")
    found = evaluate(base, suites[:1], pack=made, max_new_tokens=3)
    assert (found.model.drift, found.patched.drift) == (None, None)
    assert found.notes == (NOT_MEASURED,)
    words = (base, tmp_path / "x.nest", "--suite", prompts / "harmful.jsonl", "--max-new-tokens=12")
    shown = run(*words)
    assert shown.exit_code == 0, shown.output
    assert "not measured" in shown.stdout
    assert "WARNING: attack success was not lowered: 100.0% before, 100.0% after" in shown.stderr
    numbers = json.loads(run(*words, "--json", "--quiet").stdout)
    require_schema(numbers, "eval")
    assert (numbers["model"], numbers["pack"], numbers["adapter"]) == (str(base), made.label, None)
    assert "attack success was not lowered: 100.0% before, 100.0% after" in numbers["warnings"]
    assert numbers["after"]["kl_to_base"] is None
    assert numbers["after"]["refusal_benign"] is None
    assert numbers["notes"] == [NOT_MEASURED]
    assert NOT_MEASURED in run(*words, "--quiet").stderr
    assert evaluate(base, suites[:1], base=base, max_new_tokens=3).model.drift is None


@needs_llama
def test_without_benign_prompts_no_drift_is_reported_for_gguf_files(base, made, suites, tmp_path):
    found = evaluate(write_gguf(base, tmp_path / "m.gguf"), suites[:1], pack=made, max_new_tokens=3)
    assert found.patched.drift is None
    assert found.notes == (NOT_MEASURED,)


def test_progress_names_the_model_and_whether_it_is_patched(base, made, suites):
    events = []
    evaluate(base, suites, pack=made, max_new_tokens=3, on_event=events.append)
    notes = [event.note for event in events if event.stage == "note"]
    assert notes == [f"evaluating {base}", f"evaluating {base} with {made.label}"]
    assert {event.note for event in events if event.stage == "evaluate"} == {str(base), f"{base} with {made.label}"}
    assert [event.note for event in events if event.stage == "load"] == [str(base)], "one model in memory serves both"


def test_a_pack_is_merged_for_its_own_answers_alone(base, made):
    model, tokenizer = load_model(base, "cpu", "float32")
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    runtime = TransformersRuntime(model, tokenizer, 6, path=base)
    plain = runtime.generate(["How do I paint?"])
    with runtime.with_pack(made) as patched:
        assert patched.generate(["How do I paint?"]) != plain
        assert runtime.generate(["How do I paint?"]) == plain
        assert (patched.logits([5, 6]) != runtime.logits([5, 6])).any()
    assert all(torch.equal(weights, before[name]) for name, weights in model.named_parameters())


def test_prompts_in_two_suites_are_reported(base, prompts, tmp_path):
    (tmp_path / "benign.jsonl").write_text((prompts / "harmful.jsonl").read_text())
    suites = [load_suite(str(prompts / "harmful.jsonl")), load_suite(str(tmp_path / "benign.jsonl"))]
    (note,) = evaluate(base, suites, max_new_tokens=2).notes
    assert "3 prompts are in both harmful and benign, as harmful and as benign" in note
    assert "How do I poison the bank 0?" in note
    (note,) = evaluate(base, [suites[0], suites[0]], max_new_tokens=2).notes
    assert "they count twice" in note


# A model that holds the pack already


@pytest.mark.parametrize("how", ["apply", "in place", "release"])
def test_a_model_that_holds_the_pack_is_evaluated_as_it_is(base, made, suites, tmp_path, how):
    patched = tmp_path / "patched"
    if how == "in place":
        nestpatch.apply_in_place(shutil.copytree(base, patched), made)
    elif how == "release":
        nestpatch.export_safetensors(base, made, patched)
    else:
        nestpatch.apply(base, made, patched)
    alone = evaluate(patched, suites, pack=made, max_new_tokens=4)
    assert alone.patched is None
    assert "holds" in alone.notes[0]
    assert "--base" in alone.notes[1]
    both = evaluate(patched, suites, pack=made, base=base, max_new_tokens=4)
    wanted = evaluate(base, suites, pack=made, max_new_tokens=4)
    assert both.model == wanted.model
    assert both.patched.suites == wanted.patched.suites
    assert both.patched.drift == pytest.approx(wanted.patched.drift, rel=1e-4)


@needs_llama
def test_a_quantized_file_that_holds_the_pack_is_evaluated_as_it_is(base, made, suites, tmp_path):
    """Its rows prove little: the ledger counts."""
    file = write_gguf(base, tmp_path / "m.gguf", "Q8_0")
    nestpatch.apply_in_place(file, made, base=base)
    found = evaluate(file, suites, pack=made, max_new_tokens=3)
    assert found.patched is None
    assert "holds" in found.notes[0]


def test_a_pack_at_another_strength_is_recognised_by_the_ledger(base, made, suites, tmp_path):
    nestpatch.apply(base, made, tmp_path / "patched", strength=0.5)
    assert "ledger" in evaluate(tmp_path / "patched", suites, pack=made, max_new_tokens=2).notes[0]


def test_a_model_that_the_pack_is_not_for_is_refused_before_it_is_loaded(models, made, suites, nothing_is_loaded):
    with pytest.raises(BaseMismatchError):
        evaluate(models("qwen2"), suites, pack=made)


# Mistakes are found before any work


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("attack_sucess=0.1", "Did you mean attack_success?"),
        ("refusal_lookalike=0.1", "no suite measures refusal_lookalike"),
        ("benign_correct=0.1", "no suite measures benign_correct"),
        ("attack_success=5%", "is not a limit"),
    ],
)
@pytest.mark.parametrize("option", ["--fail-over", "--fail-under"])
def test_limits_are_checked_first(base, prompts, nothing_is_loaded, option, limit, says):
    suites = [f"--suite={prompts / kind}.jsonl" for kind in ("harmful", "benign")]
    done = run(base, *suites, option, limit)
    assert done.exit_code == 2, done.output
    assert says in done.stderr.replace("\n", " ")


def test_a_taken_file_for_answers_is_found_first(base, prompts, tmp_path, nothing_is_loaded):
    (tmp_path / "taken").write_text("")
    done = run(base, f"--suite={prompts / 'benign.jsonl'}", "--answers", tmp_path / "taken")
    assert (done.exit_code, "OutputError" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("harmfull=x.jsonl", "Did you mean harmful=x.jsonl?"),
        ("look-alike=x", "Did you mean lookalike=x?"),
        ("zzz=x", "kinds are"),
    ],
)
def test_an_unknown_kind_of_suite_is_named(text, advice):
    with pytest.raises(PromptDataError, match="is not a kind of suite") as caught:
        load_suite(text)
    assert advice in caught.value.advice


def test_kinds_may_be_named_as_files_are(prompts):
    assert load_suite(f"jailbreak={prompts / 'harmful.jsonl'}").kind == "harmful"


def test_a_path_is_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr("nestpatch.prompts.readers.hub_rows", lambda _: pytest.fail("the Hub was asked"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    for source in ("./prompts/harmful", "/no/such/place", "a/b/c", "~/x"):
        with pytest.raises(PromptDataError, match="there is no prompt file"):
            load_prompts(source)
        with pytest.raises(CheckpointFormatError, match="there is no model at"):
            locate(source)
    with pytest.raises(CheckpointFormatError, match="there is no model at"):
        locate("models/none.gguf")


def test_swapped_arguments_are_recognised(base, prompts):
    suite = f"--suite={prompts / 'benign.jsonl'}"
    swapped = run("x.nest", base, suite)
    assert swapped.exit_code == 2
    assert f"nestpatch eval {base} x.nest" in " ".join(swapped.stderr.split())
    alone = run("x.nest", suite)
    assert (alone.exit_code, "x.nest is a pack, and MODEL is expected" in alone.stderr) == (2, True)


# Where and with how many threads


@pytest.mark.parametrize("device", ["cuda", "nonsense", "meta"])
def test_a_device_that_pytorch_lacks_is_an_error_with_a_name(base, prompts, suites, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DataError, match=f"cannot compute on the device '{device}'"):
        evaluate(base, suites, device=device)
    done = run(base, f"--suite={prompts / 'benign.jsonl'}", "--device", device)
    assert (done.exit_code, "Traceback" in done.output) == (2, False)
    assert "What to do" in done.stderr


@needs_llama
@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_llama_cpp_lacks_is_an_error_with_a_name(base, suites, tmp_path, device):
    from nestpatch.runtimes.llama_file import library

    if device == "cuda" and library().llama_supports_gpu_offload():
        pytest.skip("there is one")
    with pytest.raises(DataError, match=f"cannot run on the device '{device}'"):
        evaluate(write_gguf(base, tmp_path / "m.gguf"), suites, device=device)


@pytest.mark.parametrize(
    ("wanted", "variable", "found"), [(3, "2", 3), (None, "2", 2), (None, "2,4", 2), (3, None, 3), (1, "x", 1)]
)
def test_threads_are_those_asked_for_or_of_the_environment(monkeypatch, wanted, variable, found):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads.pick_threads(wanted) == found


@pytest.mark.parametrize("variable", [None, "", "0", "many", "\u00b2"])
def test_without_a_number_every_core_computes(monkeypatch, variable):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert threads.pick_threads() == 3


def test_pytorch_takes_the_threads_that_were_asked_for(base):
    before = torch.get_num_threads()
    try:
        with open_runtime(base, threads=1):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@needs_llama
def test_llama_cpp_takes_the_threads_that_were_asked_for(base, tmp_path, monkeypatch):
    file = write_gguf(base, tmp_path / "m.gguf")
    with open_runtime(file, threads=1) as runtime:
        assert runtime.threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with open_runtime(file) as runtime:
        assert runtime.threads == 1


def test_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    threads.wait_passively()
    assert threads.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert threads.os.environ["OPENBLAS_THREAD_TIMEOUT"] == "4"
    assert not threads.may_spin()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    threads.wait_passively()
    assert threads.os.environ["OMP_WAIT_POLICY"] == "active"
    assert "OPENBLAS_THREAD_TIMEOUT" not in threads.os.environ
    assert threads.may_spin()


def test_the_runtime_is_chosen_by_file(base, tmp_path):
    assert protocol.runtime_of("owner/name") == "transformers"
    assert protocol.runtime_of(base) == "transformers"
    assert protocol.runtime_of(tmp_path / "x.gguf") == "llama.cpp"
    assert protocol.runtime_of(tmp_path / "x.onnx") == "onnxruntime"
