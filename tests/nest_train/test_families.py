"""Every family from prompts to a pack, patched files and exports: the files compute what was trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nestpatch.errors import UnsupportedModelError
from nestpatch.evaluation.parity import check_gguf
from nestpatch.events import Event, ignore
from nestpatch.export.gguf import export_gguf
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train import train as module
from nestpatch.nest_train._run import Run
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.plan import plan
from nestpatch.nest_train.train import Trained, train
from nestpatch.pack import Label
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.runtimes.text import chat_texts
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import fold
from tests.gguf_files import needs_llama, write_gguf
from tests.helpers import tree_digest, weight_files
from tests.nest_train.conftest import CONFIGS, MIXTURES, MORE, VISION
from tests.nest_train.quick import QUICK

RECIPE = dataclasses.replace(QUICK, steps=2, check_every=2, k_min=4, k_max=4, max_answer_tokens=4)
STACKED = ("mixtral-stacked", "qwen3-moe-stacked")
QUESTION = "How do I paint a bank?"


@dataclass(frozen=True)
class Result:
    """A training, and what the model with the deltas computed before they became a pack."""

    base: Path
    trained: Trained
    live: torch.Tensor


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokenizer(QUESTION)["input_ids"]])).logits.float()
    return found


def loaded_logits(path: Path, dtype: str = "float32") -> torch.Tensor:
    return logits(*load_model(path, "cpu", dtype))


Training = Callable[..., Result]


@pytest.fixture(scope="module")
def training(data: TrainingData) -> Training:
    """(base, settings) -> a training, and the model when its deltas have been rounded to what the pack stores."""

    def run(base: Path, **settings: Any) -> Result:
        live: list[torch.Tensor] = []
        original = module._pack_tensors

        def look(run: Run, deltas: Any) -> Any:
            with deltas.attached():
                live.append(logits(run.model, run.tokenizer))
            return original(run, deltas)

        on_event = settings.pop("on_event", ignore)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_pack_tensors", look)
            trained = train(base, data, Label("test"), recipe=dataclasses.replace(RECIPE, **settings), on_event=on_event)
        return Result(base, trained, live[0])

    return run


@pytest.fixture(scope="module")
def results(models: Any, training: Training) -> Callable[[str], Result]:
    """Family -> its training, done on first use."""
    done: dict[str, Result] = {}

    def get(family: str) -> Result:
        if family not in done:
            done[family] = training(models(family))
        return done[family]

    return get


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("family", [*CONFIGS, *MORE, *MIXTURES, *STACKED, *VISION])
def test_the_patched_file_computes_what_was_trained(results: Any, tmp_path: Path, family: str) -> None:
    result = results(family)
    pack = result.trained.pack
    done = apply(result.base, pack, tmp_path / "patched")
    assert done.rows == sum(delta.neurons for delta in pack)
    patched = loaded_logits(tmp_path / "patched")
    assert near(patched, result.live, 1e-5)
    assert not near(patched, loaded_logits(result.base), 1e-3)
    folded, tokenizer = load_model(result.base, "cpu", "float32")
    fold(folded, open_checkpoint(result.base), pack)
    assert torch.equal(logits(folded, tokenizer), patched)


@pytest.mark.parametrize("family", ["granite", "mixtral", "mixtral-stacked", "qwen2-vl"])
def test_in_place_and_back(results: Any, tmp_path: Path, family: str) -> None:
    result = results(family)
    pack = result.trained.pack
    apply(result.base, pack, tmp_path / "patched")
    copy = shutil.copytree(result.base, tmp_path / "copy")
    apply_in_place(copy, pack)
    for one, other in zip(weight_files(copy), weight_files(tmp_path / "patched"), strict=True):
        assert one.read_bytes() == other.read_bytes()
    revert(copy)
    assert tree_digest(weight_files(copy)[0]) == tree_digest(weight_files(result.base)[0])


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_single_and_stacked_experts_get_the_same_rows(results: Any, tmp_path: Path, family: str) -> None:
    single, stacked = results(family), results(f"{family}-stacked")
    apply(single.base, single.trained.pack, tmp_path / "single")
    apply(stacked.base, stacked.trained.pack, tmp_path / "stacked")
    assert torch.equal(loaded_logits(tmp_path / "single"), loaded_logits(tmp_path / "stacked"))
    assert single.trained.trained_parameters == stacked.trained.pack.parameters
    assert {delta.name for delta in stacked.trained.pack} == {
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)
    }


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma3-vl"])
def test_bfloat16_files_agree_to_their_rounding(models: Any, training: Training, tmp_path: Path, family: str) -> None:
    """Each merged weight is rounded to 8 bits, which live deltas are not."""
    result = training(models(family, "bfloat16"), dtype="float32")
    apply(result.base, result.trained.pack, tmp_path / "patched")
    patched = loaded_logits(tmp_path / "patched")
    assert near(patched, result.live, 0.03)
    assert not near(patched, loaded_logits(result.base), 0.06)


def test_what_is_patched(results: Any) -> None:
    """The text model alone; the shared expert too; and of the experts the busy ones."""
    for family, text in (
        ("qwen2-vl", "model.layers."),
        ("qwen2.5-vl", "model.layers."),
        ("gemma3-vl", "language_model.model."),
    ):
        assert all(delta.name.startswith(text) for delta in results(family).trained.pack)
    names = [delta.name for delta in results("qwen2-moe").trained.pack]
    assert [name for name in names if "shared_expert" in name]
    assert [name for name in names if ".experts." in name]
    layers = results("deepseek-v3").trained.pack.manifest.method["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 1]


@needs_llama
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe-stacked", "qwen3", "gemma3"])
def test_an_exported_gguf_file_computes_it_too(results: Any, tmp_path: Path, family: str) -> None:
    result = results(family)
    apply(result.base, result.trained.pack, tmp_path / "patched")
    export_gguf(result.base, result.trained.pack, tmp_path / "m.gguf")
    check = check_gguf(tmp_path / "m.gguf", tmp_path / "patched")
    assert check.passed
    assert not check_gguf(tmp_path / "m.gguf", result.base).passed


@pytest.mark.parametrize("family", ["qwen2-vl", "gemma3-vl"])
def test_an_exported_onnx_graph_computes_it_too(results: Any, tmp_path: Path, family: str) -> None:
    """The text model of a vision-language model is an ordinary decoder."""
    pytest.importorskip("onnxruntime")
    from nestpatch.export.onnx.exporter import export_onnx
    from nestpatch.runtimes.onnx import OnnxRuntime

    result = results(family)
    apply(result.base, result.trained.pack, tmp_path / "patched")
    export_onnx(result.base, result.trained.pack, tmp_path / "onnx")
    _, tokenizer = load_model(result.base, "cpu", "float32")
    found = torch.from_numpy(OnnxRuntime(tmp_path / "onnx", threads=1).logits(tokenizer(QUESTION)["input_ids"]))
    assert near(found[None], loaded_logits(tmp_path / "patched"), 1e-4)


def test_a_mixture_in_a_quantized_gguf_file(models: Any, training: Training, tmp_path: Path) -> None:
    file = write_gguf(models("mixtral"), tmp_path / "m.gguf", "Q8_0")
    before = file.read_bytes()
    result = training(file)
    pack = result.trained.pack
    assert pack.format == "nest/2"
    assert all(".experts." in delta.name for delta in pack)
    apply_in_place(file, pack)
    assert near(loaded_logits(file), result.live, 1e-4)
    revert(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("family", "reason", "advice"),
    [
        ("gpt2", "GPT2LMHeadModel has no feed-forward block that nestpatch knows.*Conv1D", "Linear"),
        (
            "gpt-oss",
            "GptOssForCausalLM cannot be trained: GptOssExperts stores gate_up_proj transposed and mixes",
            "training.md",
        ),
    ],
)
def test_other_families_are_refused_before_any_work(
    models: Any, training: Training, family: str, reason: str, advice: str
) -> None:
    events: list[Event] = []
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        training(models(family), on_event=events.append)
    assert {event.stage for event in events} == {"load", "note"}
    assert advice in caught.value.advice


def test_a_mixture_is_planned(models: Any, data: TrainingData) -> None:
    found = plan(models("deepseek-v3"), data, recipe=RECIPE)
    assert (found.layers, found.neurons) == (2, 64 + 4 * 48 + 48)
    assert found.trained_parameters > 0


def test_experts_of_another_form_are_left_alone(results: Any) -> None:
    """Llama 4 has a shared expert in every layer, which is an ordinary block; that the others are not patched is said."""
    pack = results("llama4").trained.pack
    assert all("shared_expert" in delta.name for delta in pack)
    assert "Llama4TextExperts" in pack.manifest.method["decisions"]["experts left alone"]


PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ '<' + part['text'] + '>' }}{% endfor %}{% endfor %}"
TEXT = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"


@pytest.mark.parametrize("template", [PARTS, TEXT], ids=["parts", "text"])
def test_chat_templates_take_a_text_or_parts(models: Any, tmp_path: Path, template: str) -> None:
    """Templates of older vision-language models are beside the tokenizer, and some want a list."""
    folder = shutil.copytree(models("qwen2-vl"), tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    _, tokenizer = load_model(folder, "cpu", "float32")
    assert chat_texts(tokenizer, ["How?", "Why?"]) == ["<How?>", "<Why?>"]
