"""Eight families: the exported graph is the model, whatever the padding and however the text is cut; and it is well named."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch

from nestpatch.runtimes.onnx import OnnxRuntime
from tests.onnx_export.conftest import FAMILIES, VOCABULARY
from tests.onnx_export.runs import Run, batch, reference, weights

EXACT = 1e-4
PLAIN = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize(("rows", "length", "pads"), [(1, 1, ()), (1, 40, ()), (3, 24, (0, 7, 20))])
def test_logits_are_those_of_transformers(family, exports, sources, torch_model, rows, length, pads):
    done = exports(family)
    ids, mask = batch(rows, length, pads)
    wanted, real = reference(torch_model(sources(family)), ids, mask), mask.astype(bool)
    got = Run(done.path / "model.onnx")(ids, mask)
    assert np.abs(got - wanted)[real].max() < EXACT
    assert done.parity[0].largest < EXACT
    assert wanted.std() > 0.5, "a model that says nothing would agree with everything"


@pytest.mark.parametrize("cuts", [(0, 9, 24), (0, 1, 2, 23, 24), (0, 20, 21, 22, 23, 24)])
def test_a_text_may_be_read_in_steps(family, exports, sources, torch_model, cuts):
    ids, mask = batch(2, 24, (0, 5), seed=2)
    run = Run(exports(family).path / "model.onnx")
    parts = [run(ids[:, a:b], mask[:, :b]) for a, b in pairwise(cuts)]
    wanted = reference(torch_model(sources(family)), ids, mask)
    assert np.abs(np.concatenate(parts, 1) - wanted)[mask.astype(bool)].max() < EXACT


def test_greedy_answers_are_those_of_transformers(family, exports, sources, torch_model):
    rows = [batch(1, length, seed=length)[0][0].tolist() for length in (5, 17, 9, 9)]
    got = OnnxRuntime(exports(family).path, threads=1, batch=3).greedy(rows, 24, ends={2})
    model = torch_model(sources(family))
    for row, answer in zip(rows, got, strict=True):
        given = torch.tensor([row])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=2
        )
        assert answer == out[0, len(row) :].tolist()


def test_names_and_dimensions_are_those_of_other_tools(family, exports):
    graph = onnx.load(str(exports(family).path / "model.onnx"), load_external_data=False).graph
    kept = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [value.name for value in graph.input] == [*PLAIN, *(f"past_key_values.{name}" for name in kept)]
    assert [value.name for value in graph.output] == ["logits", *(f"present.{name}" for name in kept)]
    dimensions = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dimensions["input_ids"] == dimensions["position_ids"] == ["batch_size", "sequence_length"]
    assert dimensions["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert dimensions["past_key_values.1.key"] == ["batch_size", 2, "past_sequence_length", 16]
    assert dimensions["present.1.value"] == ["batch_size", 2, "total_sequence_length", 16]
    assert dimensions["logits"] == ["batch_size", "sequence_length", VOCABULARY]


def test_weights_have_the_names_that_transformers_gives_them(family, exports, sources, torch_model):
    model = torch_model(sources(family))
    stored = weights(exports(family).path)
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tied = model.config.tie_word_embeddings
    found = [name for name in linear if f"{name}.MatMul.weight" in stored]
    assert set(linear) - set(found) == ({"lm_head"} if tied else set())
    for name in found:
        assert np.array_equal(stored[f"{name}.MatMul.weight"], linear[name].detach().numpy().T)
    assert np.array_equal(stored["model.embed_tokens.weight"], model.get_input_embeddings().weight.detach().numpy())
    nodes = onnx.load(str(exports(family).path / "model.onnx"), load_external_data=False).graph.node
    assert {"/model/layers.1/mlp/down_proj/MatMul", "/model/layers.0/self_attn/o_proj/MatMul"} <= {node.name for node in nodes}


def test_nothing_tells_where_it_was_made(family, exports, sources):
    done = exports(family)
    for file in done.path.iterdir():
        data = file.read_bytes() if file.name != "model.onnx_data" else b""
        for trace in (str(done.path.parent), str(sources(family).parent), "site-packages", ".py", "_name_or_path"):
            assert trace.encode() not in data, f"{file.name} holds {trace}"
    assert (done.path / "model.onnx").stat().st_size < 80_000


def test_a_configuration_for_every_reader_lies_beside_it(family, exports, sources, tokenizer):
    import transformers

    done, source = exports(family), sources(family)
    assert {file.name for file in done.path.iterdir()} == {
        "model.onnx", "model.onnx_data", "config.json", "generation_config.json", "genai_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    config = json.loads((done.path / "config.json").read_text())
    browser = config.pop("transformers.js_config")
    assert browser == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert config == json.loads((source / "config.json").read_text())
    genai = json.loads((done.path / "genai_config.json").read_text())["model"]
    assert (genai["bos_token_id"], genai["eos_token_id"], genai["pad_token_id"]) == (1, [2], 0)
    assert genai["decoder"]["head_size"] == 16
    read = transformers.AutoTokenizer.from_pretrained(done.path)
    chat = [{"role": "user", "content": "How do I bake bread?"}]
    assert read.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    said = json.loads((done.path / "tokenizer_config.json").read_text())
    assert said["chat_template"] == tokenizer.chat_template
