"""From prompts to a pack, a patched file and its logits, on tiny random models; test_families.py has every family."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from nestpatch.cli import main
from nestpatch.errors import CheckpointFormatError, DataError, PromptDataError, TrainingError
from nestpatch.evaluation.suites import load_suite
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.patcher.apply import apply
from nestpatch.prompts.readers import load_prompts
from nestpatch.runtimes.chat_form import read_chat_form
from nestpatch.runtimes.loading import load_model
from nestpatch.views.progress import STAGES
from tests.nest_train.quick import QUICK, options
from tests.schemas import require_schema


def logits(folder, dtype="float32"):
    model, tokenizer = load_model(folder, "cpu", dtype)
    ids = torch.tensor([tokenizer("How do I paint a bank?")["input_ids"]])
    return model(ids).logits.float()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.06)])
def test_live_deltas_and_the_patched_file_agree(models, data, tmp_path, monkeypatch, dtype, tolerance):
    """float32: to rounding. bfloat16 on disk: each merged weight is rounded to 8 bits, which live deltas are not."""
    from nestpatch.nest_train import _pack as module

    base, live = models("llama", dtype), {}
    original = module._pack_tensors

    def spy(run, deltas):
        model, tokenizer = load_model(base, "cpu", "float32")
        ids = torch.tensor([tokenizer("How do I paint a bank?")["input_ids"]])
        layers = model.get_submodule("model.layers")
        for projection, delta in deltas.places:
            name = projection.weight_name
            parent = layers.get_submodule(name.removeprefix("model.layers.").rpartition(".")[0].rpartition(".")[0])
            setattr(parent, name.split(".")[-2], delta)
        live["logits"] = model(ids).logits
        return original(run, deltas)

    monkeypatch.setattr(module, "_pack_tensors", spy)
    trained = train(base, data, Label("test"), recipe=QUICK)
    apply(base, trained.pack, tmp_path / "patched")
    patched = logits(tmp_path / "patched")
    scale = patched.abs().max()
    assert (patched - live["logits"]).abs().max() <= tolerance * scale
    assert (patched - logits(base)).abs().max() > 4 * tolerance * scale if dtype == "float32" else True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sharded_and_single_bases_get_the_same_rows(models, data, tmp_path, dtype):
    single, sharded = models("llama", dtype), models("llama", dtype, "20KB")
    assert len(open_checkpoint(sharded).files) > 1
    pack = train(single, data, Label("test"), recipe=QUICK).pack
    apply(single, pack, tmp_path / "single")
    apply(sharded, pack, tmp_path / "sharded")
    one, many = open_checkpoint(tmp_path / "single"), open_checkpoint(tmp_path / "sharded")
    for name in one.tensors():
        assert b"".join(one.read_all(name)) == b"".join(many.read_all(name)), name
    assert torch.equal(logits(tmp_path / "single"), logits(tmp_path / "sharded"))


def test_the_pack_tells_how_it_was_made(models, data, prompts, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    suites = [load_suite(str(prompts / f"{kind}.jsonl")) for kind in ("harmful", "benign", "lookalike")]
    label = Label("no-harm", "1.2.3", "Says no.", "MIT", ("x",))
    trained = train(models("llama"), data, label, recipe=QUICK, suites=suites)
    manifest = trained.pack.manifest
    assert (manifest.name, manifest.version, manifest.license, manifest.tags) == ("no-harm", "1.2.3", "MIT", ("x",))
    assert manifest.created == "2023-11-14T22:13:20Z"
    assert manifest.base.architecture == "LlamaForCausalLM"
    assert Recipe(**manifest.method["recipe"]) == QUICK
    assert manifest.method["data"]["harmful"]["sha256"] == data.harmful.digest
    assert len(manifest.method["layers"]) == 2
    assert set(manifest.method["decisions"]) >= {"device", "dtype", "refusals", "benign answers"}
    assert manifest.method["chat"] == read_chat_form(models("llama")).facts()
    assert "What is the capital of France?" in manifest.method["chat"]["prompt"]
    assert manifest.evaluation["before"]["attack_success"]["total"] == 30
    assert manifest.evaluation["after"]["kl_to_base"] > 0
    again = train(models("llama"), data, label, recipe=QUICK, suites=suites)
    assert nest.encode(again.pack) == nest.encode(trained.pack)


def test_leaving_look_alikes_out_is_said(models, data):
    notes = []
    bare = TrainingData(data.harmful, data.benign)
    trained = train(models("llama"), bare, Label("test"), recipe=QUICK, on_event=lambda e: notes.append(e.note))
    assert any("20-40 points" in note for note in notes)
    assert "20-40 points" in trained.pack.manifest.method["decisions"]["lookalike"]


def test_given_answers_are_used_when_asked_for(models, data, tmp_path):
    with pytest.raises(PromptDataError, match="60 of 60 benign prompts have no answer"):
        train(models("llama"), data, Label("test"), recipe=dataclasses.replace(QUICK, benign_targets="given"))
    rows = [json.dumps({"prompt": f"Paint fence {i}", "answer": "ok"}) for i in range(30)]
    (tmp_path / "benign.jsonl").write_text("\n".join(rows))
    given = TrainingData(data.harmful, load_prompts(tmp_path / "benign.jsonl"))
    trained = train(models("llama"), given, Label("test"), recipe=dataclasses.replace(QUICK, benign_targets="given"))
    assert "30 kept" in trained.pack.manifest.method["decisions"]["benign answers"]


def test_prompts_on_both_sides_and_too_few_prompts_are_refused(models, data, tmp_path):
    with pytest.raises(PromptDataError, match="both harmful and harmless"):
        train(models("llama"), TrainingData(data.harmful, data.harmful), Label("test"), recipe=QUICK)
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    with pytest.raises(PromptDataError, match="few contains 2 harmful prompts; at least 20") as caught:
        train(models("llama"), TrainingData(load_prompts(tmp_path / "few.txt"), data.benign), Label("test"), recipe=QUICK)
    assert "--harmful can be repeated" in caught.value.advice
    with pytest.raises(PromptDataError, match="2 benign prompts") as caught:
        train(models("llama"), TrainingData(data.harmful, load_prompts(tmp_path / "few.txt")), Label("test"), recipe=QUICK)
    assert "--benign can be repeated" in caught.value.advice


def test_a_threshold_that_keeps_nothing_is_explained(models, data):
    with pytest.raises(TrainingError, match="no neuron") as caught:
        train(models("llama"), data, Label("test"), recipe=dataclasses.replace(QUICK, threshold=50.0))
    assert "threshold" in caught.value.advice


def test_neurons_below_the_first_layer_alone_are_explained(models, data, monkeypatch):
    from nestpatch.nest_train import _layers as module

    def low(layer, *arguments):
        found = select(layer, *arguments)
        return found if layer == 0 else found.skipped("skipped: for this test")

    select = module.select
    monkeypatch.setattr(module, "select", low)
    with pytest.raises(TrainingError, match="below layer 1, the first that is patched; layer 1: skipped"):
        train(models("llama"), data, Label("test"), recipe=dataclasses.replace(QUICK, first_layer=1))


def test_layers_below_the_first_are_left_alone_and_computed_once(models, data):
    recipe = dataclasses.replace(QUICK, first_layer=1, check_prompts=2, delta_dtype="F32")
    events = []
    trained = train(models("llama"), data, Label("test"), recipe=recipe, on_event=events.append)
    assert {delta.name.split(".")[2] for delta in trained.pack} == {"1"}
    method = trained.pack.manifest.method
    assert method["decisions"]["step"].startswith("from layer 1 (the layers below are frozen")
    assert method["decisions"]["first layer"] == "1 (asked for)"
    assert [layer["clusters"] > 0 for layer in method["layers"]] == [layer["neurons"] > 0 for layer in method["layers"]]
    assert [look["step"] for look in method["tuning"]["held_out"]] == [0, 3, 6]
    assert all(0 <= look["refusal_lookalike"] <= 1 for look in method["tuning"]["held_out"])
    assert {event.stage for event in events} >= {"distil", "probe", "select", "cluster", "remember", "look", "tune"}


def test_every_stage_has_a_name_for_people(models, data):
    stages = set()
    recipe = dataclasses.replace(QUICK, check_prompts=2)
    train(models("llama"), data, Label("test"), recipe=recipe, on_event=lambda event: stages.add(event.stage))
    assert stages - {"note"} <= set(STAGES)


def test_weights_that_differ_from_the_loaded_ones_are_noticed(models, data, tmp_path, monkeypatch):
    """A checkpoint whose tensors are converted while loading must not become a pack for the wrong rows."""
    from nestpatch.nest_train import _run as module

    other = shutil.copytree(models("llama"), tmp_path / "other")
    with safe_open(other / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    from safetensors.numpy import save_file

    name = "model.layers.0.mlp.gate_proj.weight"
    save_file({**tensors, name: np.ascontiguousarray(tensors[name][::-1])}, other / "model.safetensors")
    monkeypatch.setattr(module, "open_model", lambda _: (open_checkpoint(other), None))
    with pytest.raises(CheckpointFormatError, match="is not the weight that transformers loaded"):
        train(models("llama"), data, Label("test"), recipe=QUICK)


@pytest.mark.parametrize("label", [Label("../up"), Label("a/b"), Label("ok", "1.0"), Label("")])
def test_labels_are_checked_before_the_work(label):
    with pytest.raises(DataError):
        label.check()


def train_arguments(base, prompts, output, *more):
    sets = [f"--{kind}={prompts / kind}.jsonl" for kind in ("harmful", "benign", "lookalike")]
    return ["train", str(base), *sets, "-o", str(output), *options(), *more]


def test_the_command_line_trains_shows_applies_and_evaluates(models, prompts, tmp_path):
    run = CliRunner().invoke
    pack, base = tmp_path / "safe.nest", models("llama", "bfloat16")
    suites = [f"--suite={prompts / kind}.jsonl" for kind in ("harmful", "benign", "lookalike")]
    result = run(main, train_arguments(base, prompts, pack, "--json", "--quiet", *suites))
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    require_schema(facts, "train")
    assert (facts["model"], facts["output"], facts["bytes"]) == (str(base), str(pack), pack.stat().st_size)
    assert facts["pack_id"] == nest.pack_id(nest.read(pack))
    shown = run(main, ["show", str(pack), "--rows"])
    assert shown.exit_code == 0
    for word in ("safe 1.0.0", "LlamaForCausalLM", "gate_proj", "attack success", "layer 1", "held out, step 3"):
        assert word in shown.stdout
    assert "held out" not in run(main, ["show", str(pack)]).stdout
    assert json.loads(run(main, ["show", str(pack), "--json"]).stdout)["pack_id"] == facts["pack_id"]
    applied = run(main, ["apply", str(base), str(pack), "-o", str(tmp_path / "patched"), "--json"])
    assert json.loads(applied.stdout)["tensors"] == 4
    both = run(main, ["eval", str(base), str(pack), *suites, "--json", "--quiet", "--max-new-tokens=6"])
    direct = run(
        main,
        ["eval", str(tmp_path / "patched" / "model.safetensors"), *suites, "--json", "--quiet", "--max-new-tokens=6"],
    )
    folded, alone = json.loads(both.stdout)["after"], json.loads(direct.stdout)["before"]
    assert folded.pop("kl_to_base") > 0
    assert folded.pop("answer_agreement")["total"] == 30
    assert (alone.pop("kl_to_base"), alone.pop("answer_agreement")) == (None, None)
    assert folded == alone
    answers = tmp_path / "answers.jsonl"
    table = run(main, ["eval", str(base), *suites, "--quiet", "--max-new-tokens=3", "--answers", str(answers)])
    assert "attack success" in table.stdout
    assert len(answers.read_text().splitlines()) == 90
    gate = ["eval", str(base), suites[0], "--quiet", "--max-new-tokens=3"]
    failed = run(main, [*gate, "--fail-over=attack_success=0.9"])
    assert (failed.exit_code, bool(re.search("FAILED: attack_success is .*%, over 90.00%", failed.stderr))) == (1, True), (
        failed.output
    )
    assert run(main, [*gate, "--fail-under=attack_success=0.9"]).exit_code == 0
    assert run(main, [*gate, "--fail-under=benign_correct=0"]).exit_code == 2


def test_usage_and_user_errors_end_with_two_others_with_one(models, prompts, tmp_path):
    run = CliRunner().invoke
    base = models("llama")
    taken = tmp_path / "taken.nest"
    taken.touch()
    for arguments, code, name in [
        (train_arguments(base, prompts, taken), 1, "OutputError"),
        (train_arguments(base, prompts, tmp_path / "x.nest", "--set", "steps=0"), 2, "RecipeError"),
        (train_arguments(base, prompts, tmp_path / "x.nest", "--name", "a/b"), 2, "DataError"),
        (train_arguments(tmp_path / "none", prompts, tmp_path / "x.nest"), 2, "MissingInputError"),
        (train_arguments(models("gpt2"), prompts, tmp_path / "x.nest"), 1, "UnsupportedModelError"),
        (train_arguments(base, tmp_path, tmp_path / "x.nest"), 2, "PromptDataError"),
        (["eval", str(base), "--suite", str(prompts / "none.jsonl")], 2, "PromptDataError"),
        (["eval", str(base), str(taken), "--suite", str(prompts / "benign.jsonl")], 1, "PackFormatError"),
        (["nonsense"], 2, "No such command"),
    ]:
        result = run(main, arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert name in result.stderr
        assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.nest"]


def test_without_the_train_extra_the_way_out_is_named(prompts, tmp_path):
    """A base install has no torch: the command says what to install."""
    code = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\nfrom nestpatch.cli import main; main()"
    arguments = ["eval", str(tmp_path), "--suite", str(prompts / "benign.jsonl")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "MissingExtraError" in result.stderr
    assert "pip install 'nestpatch[train]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_settings_are_listed():
    result = CliRunner().invoke(main, ["train", "--help-recipe"])
    assert result.exit_code == 0
    for name in Recipe().as_json():
        assert name in result.stdout
