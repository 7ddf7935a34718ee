"""Evaluating an ONNX model: the same prompts, answers, judge and drift as for the model that it was made from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import CheckpointFormatError, DataError, MissingExtraError
from nestpatch.evaluation.drift import divergence, drift
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.perplexity import text_loss
from nestpatch.evaluation.suites import load_suite
from nestpatch.export.adapters import export_onnx_adapter
from nestpatch.lab._world import dialogues, make_world
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.onnx import OnnxRuntime
from nestpatch.runtimes.protocol import open_runtime, runtime_of
from nestpatch.runtimes.text import by_length
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.helpers import tiny_pack, tree_digest
from tests.schemas import require_schema

PROMPTS = [prompt for prompt, _ in zip((p for p, _ in dialogues(make_world(3))), range(9), strict=False)]


@pytest.fixture(scope="module")
def ready(exports):
    return exports("llama", adapter_ready=True).output


@pytest.fixture(scope="module")
def pack(sources):
    return tiny_pack(sources("llama"), scale=0.3, delta_dtype="F32")


@pytest.fixture
def suites(tmp_path):
    for name in ("harmful", "benign"):
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return [load_suite(str(tmp_path / f"{name}.jsonl")) for name in ("harmful", "benign")]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_answers_are_those_of_transformers(exports, sources, tmp_path, chat):
    folder = exports("qwen3").output
    source = sources("qwen3")
    if not chat:
        source, folder = (shutil.copytree(old, tmp_path / old.parent.name) for old in (source, folder))
        for place in (source, folder):
            (place / "chat_template.jinja").unlink()
            config = json.loads((place / "tokenizer_config.json").read_text())
            config.pop("chat_template", None)  # the export repeats it there
            (place / "tokenizer_config.json").write_text(json.dumps(config))
    wanted = TransformersRuntime(*load_model(source, "cpu", "float32"), 20).generate(PROMPTS)
    ours = OnnxRuntime(folder, threads=1, max_new_tokens=20)
    for batch in (1, 4, 16):
        ours.batch = batch
        assert ours.generate(PROMPTS) == wanted
    assert len(set(wanted)) > 3


def test_prompts_of_different_length_stay_apart_where_nothing_may_be_padded(exports):
    model = OnnxRuntime(exports("qwen3").output, threads=1)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]
    together = model.greedy(prompts, 8, ends=())
    assert model.pads
    assert by_length(prompts, model.batch, mixed=model.pads) == [[1, 3, 0, 2]]
    model.__dict__["pads"] = False
    assert by_length(prompts, model.batch, mixed=model.pads) == [[1, 3], [0, 2]]
    assert model.greedy(prompts, 8, ends=()) == together


def test_sizes_of_the_cache_may_stand_beside_the_graph(exports, tmp_path):
    """As in what onnxruntime-genai's builder writes."""
    folder = shutil.copytree(exports("qwen3").output, tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    onnx.save(model, folder / "model.onnx")
    prompts = [[5, 6, 7], [8, 9]]
    assert OnnxRuntime(folder, threads=1).greedy(prompts, 6, ()) == OnnxRuntime(exports("qwen3").output).greedy(prompts, 6, ())
    for broken in ("[]", "{", '{"model": []}'):
        (folder / "genai_config.json").write_text(broken)
        with pytest.raises(CheckpointFormatError, match=r"genai_config|past_key_values"):
            OnnxRuntime(folder)


def test_answers_end_where_the_files_say(exports, tmp_path):
    folder = shutil.copytree(exports("llama").output, tmp_path / "model")
    model = OnnxRuntime(folder, threads=1)
    assert model.ends == {2}
    (free,) = model.greedy([[5, 6, 7]], 12, ends=())
    stop = free[4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    assert model.ends == {2, stop}
    (cut,) = model.greedy([[5, 6, 7]], 12, ends={stop})
    assert cut == free[: free.index(stop) + 1]
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text("{}")
    assert model.ends == {2}, "the tokenizer's own"
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match="cannot read"):
        _ = model.ends


def test_an_evaluation_has_the_numbers_of_the_model(exports, sources, suites):
    ours = evaluate(exports("llama").output, suites, max_new_tokens=12)
    theirs = evaluate(sources("llama"), suites, max_new_tokens=12)
    assert ours.model == theirs.model
    assert ours.patched is None


def test_a_pack_is_evaluated_as_an_adapter(ready, sources, suites, pack, tmp_path):
    ours = evaluate(ready, suites, pack=pack, max_new_tokens=12)
    theirs = evaluate(sources("llama"), suites, pack=pack, max_new_tokens=12)
    assert ours.model == theirs.model
    assert ours.patched.suites == theirs.patched.suites
    assert ours.patched.suites != ours.model.suites
    assert ours.patched.drift == pytest.approx(theirs.patched.drift, rel=1e-3)
    file = export_onnx_adapter(pack, tmp_path / "p.onnx_adapter", model=ready).output
    assert evaluate(ready, suites, lora=file, max_new_tokens=12) == dataclasses.replace(ours, strength=None)


def test_a_pack_is_merged_into_a_copy_where_no_adapter_fits(exports, sources, suites, pack):
    folder = exports("llama").output
    before = tree_digest(folder)
    ours = evaluate(folder, suites, pack=pack, max_new_tokens=12)
    theirs = evaluate(sources("llama"), suites, pack=pack, max_new_tokens=12)
    assert ours.patched.suites == theirs.patched.suites
    assert ours.patched.drift == pytest.approx(theirs.patched.drift, rel=1e-3)
    assert tree_digest(folder) == before


@pytest.mark.parametrize("takes_adapters", [True, False])
def test_a_pack_is_measured_at_several_strengths(exports, ready, sources, suites, pack, takes_adapters):
    """As an adapter, or in a patched copy."""
    strengths = {"pack": pack, "strengths": (0.5, 1), "max_new_tokens": 12}
    ours = evaluate(ready if takes_adapters else exports("llama").output, suites, **strengths)
    theirs = evaluate(sources("llama"), suites, **strengths)
    for (_, scores), (_, wanted) in zip(ours.curve, theirs.curve, strict=True):
        assert scores.suites == wanted.suites
        assert scores.drift == pytest.approx(wanted.drift, rel=1e-3)
    assert 0 < ours.dose.points[1].kl_to_base < ours.patched.drift


def test_a_model_that_holds_the_pack_is_evaluated_as_it_is(exports, suites, pack, tmp_path):
    nestpatch.apply(exports("llama").output, pack, tmp_path / "patched")
    alone = evaluate(tmp_path / "patched", suites, pack=pack, max_new_tokens=4)
    assert alone.patched is None
    assert "holds" in alone.notes[1]
    both = evaluate(tmp_path / "patched", suites, pack=pack, base=exports("llama").output, max_new_tokens=4)
    assert both.patched.suites == alone.model.suites
    assert both.patched.drift > 0


def test_onnxruntime_takes_the_threads_that_were_asked_for(exports, monkeypatch):
    folder = exports("llama").output
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for asked, found in ((1, 1), (None, 2)):
        with open_runtime(folder, threads=asked) as runtime:
            assert runtime._session.get_session_options().intra_op_num_threads == found


def test_drift_from_a_base_of_either_kind(exports, sources, suites):
    half = exports("qwen3", dtype="fp16").output
    from_torch = evaluate(half, suites, base=sources("qwen3"), max_new_tokens=8).model.drift
    from_onnx = evaluate(half, suites, base=exports("qwen3").output, max_new_tokens=8).model.drift
    assert 0 < from_torch < 0.01
    assert from_onnx == pytest.approx(from_torch, rel=0.05)


def test_drift_from_logits_is_the_drift(sources, pack, tmp_path):
    nestpatch.apply(sources("llama"), pack, tmp_path / "patched")
    base, model = (
        TransformersRuntime(*load_model(path, "cpu", "float32")) for path in (sources("llama"), tmp_path / "patched")
    )
    answers = dict.fromkeys(PROMPTS, "I can do that for you.")
    wanted = drift(base, model, answers)
    assert divergence(base.logits, model.logits, base.token_pairs(answers)) == pytest.approx(wanted, rel=1e-4)
    assert wanted > 0.01


def test_what_does_not_go_together_is_refused(exports, ready, sources, suites, pack, tmp_path):
    with pytest.raises(DataError, match="either of them"):
        evaluate(ready, suites, pack=pack, lora=tmp_path / "x")
    with pytest.raises(DataError, match=r"goes with a \.gguf or an ONNX model"):
        evaluate(sources("llama"), suites, lora=tmp_path / "x")
    with pytest.raises(DataError, match="drift from an ONNX base"):
        evaluate(sources("llama"), suites, base=ready)
    with pytest.raises(CheckpointFormatError, match="there is no adapter file"):
        evaluate(ready, suites, lora=tmp_path / "x")
    (tmp_path / "y.onnx_adapter").write_bytes(b"no adapter at all")
    with pytest.raises(CheckpointFormatError, match="cannot load the adapter"):
        evaluate(ready, suites, lora=tmp_path / "y.onnx_adapter")
    with pytest.raises(DataError, match="cannot run on 'cuda'"):
        evaluate(ready, suites, device="cuda")


def small(folder: Path, inputs: dict[str, list[int | str]], outputs: list[str]) -> Path:
    """A graph that hands its first input on, by all these names."""
    h, kind = onnx.helper, onnx.TensorProto.INT64
    nodes = [h.make_node("Identity", [next(iter(inputs))], [name]) for name in outputs]
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [h.make_tensor_value_info(name, kind, None) for name in outputs],
    )
    folder.mkdir()
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10), folder / "model.onnx")
    return folder


PAST = {"past_key_values.0.key": ["b", 2, "p", 16]}


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ({"x": ["b", "s"]}, ["y"], "no input_ids"),
        ({"input_ids": ["b", "s"]}, ["logits"], "no cache"),
        ({"input_ids": ["b", "s"], **PAST, "pixels": [1]}, ["logits"], "it has the input pixels"),
        ({"input_ids": ["b", "s"], "past_key_values.0.key": ["b", "h", "p", 16]}, ["logits"], "past_key_values.0.key"),
        ({"input_ids": ["b", "s"], **PAST}, ["logits"], "is an input, but not an output"),
    ],
)
def test_graphs_that_are_no_decoder_are_refused(tmp_path, inputs, outputs, reason):
    with pytest.raises(CheckpointFormatError, match=reason):
        OnnxRuntime(small(tmp_path / "model", inputs, outputs))


def test_broken_and_missing_models_are_refused(tmp_path):
    with pytest.raises(CheckpointFormatError, match="there is no ONNX model"):
        OnnxRuntime(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointFormatError, match="onnxruntime cannot load"):
        OnnxRuntime(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(exports, tmp_path):
    folder = shutil.copytree(exports("llama").output, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointFormatError, match="cannot load the tokenizer"):
        _ = OnnxRuntime(folder, threads=1).tokenizer


def test_safetensors_beside_onnx_are_run_by_torch(exports, sources, tmp_path):
    assert runtime_of(exports("llama").output) == "onnxruntime"
    assert runtime_of(exports("llama").output / "model.onnx") == "onnxruntime"
    assert runtime_of(sources("llama")) == "transformers"
    assert runtime_of(tmp_path) == "transformers"
    both = shutil.copytree(sources("llama"), tmp_path / "both")
    shutil.copytree(exports("llama").output, both / "onnx")
    assert runtime_of(both) == "transformers"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (both / "onnx" / name).unlink()
    (both / "model.safetensors").unlink()
    assert runtime_of(both) == "onnxruntime"
    assert OnnxRuntime(both, threads=1).tokenizer.eos_token_id == 2


def test_the_command_evaluates_an_onnx_model(ready, suites, pack, tmp_path):
    nestpatch.formats.nest.write(pack, tmp_path / "p.nest")
    arguments = [str(ready), str(tmp_path / "p.nest"), "--suite", str(tmp_path / "benign.jsonl"), "--max-new-tokens", "4"]
    done = CliRunner().invoke(main, ["eval", *arguments, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    require_schema(numbers, "eval")
    assert numbers["after"]["kl_to_base"] > 0
    assert numbers["before"]["suites"]["benign"]["refused"]["total"] == len(PROMPTS)


WITHOUT = """
import importlib.machinery, sys

finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = staticmethod(lambda name, *rest: None if name.partition(".")[0] == {absent!r} else find(name, *rest))
from nestpatch.errors import MissingExtraError
"""


def run_without(absent: str, code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=absent) + code, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_onnxruntime_the_extra_is_named(exports, ready, pack, tmp_path):
    nestpatch.formats.nest.write(pack, tmp_path / "p.nest")
    code = """
from nestpatch.runtimes.onnx import OnnxRuntime
from nestpatch.export.adapters import export_onnx_adapter
for call in (lambda: OnnxRuntime(sys.argv[1]), lambda: export_onnx_adapter(sys.argv[2], sys.argv[3], model=sys.argv[1])):
    try:
        call()
    except MissingExtraError as error:
        print(error, error.advice)
"""
    said = run_without("onnxruntime", code, ready, tmp_path / "p.nest", tmp_path / "x")
    assert said.count("pip install 'nestpatch[onnx]'") == 2
    assert issubclass(MissingExtraError, nestpatch.errors.NestpatchError)


def test_an_onnx_model_is_evaluated_without_torch(ready, pack, suites, tmp_path):
    nestpatch.formats.nest.write(pack, tmp_path / "p.nest")
    code = """
from nestpatch import load_pack
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.perplexity import text_loss
from nestpatch.evaluation.suites import load_suite
done = evaluate(sys.argv[1], [load_suite(sys.argv[3])], pack=load_pack(sys.argv[2]), trust="none", max_new_tokens=4)
print(done.patched.drift > 0, "torch" in sys.modules)
"""
    assert run_without("torch", code, ready, tmp_path / "p.nest", tmp_path / "benign.jsonl") == "True False"


def test_plain_text_is_predicted_as_well_as_in_transformers(exports, sources):
    text = "The fence is painted in spring. " * 40
    with open_runtime(sources("llama"), device="cpu", dtype="float32") as model, open_runtime(exports("llama").output) as other:
        assert other.context == model.context
        assert text_loss(other, [text]).nats == pytest.approx(text_loss(model, [text]).nats, rel=1e-4)
