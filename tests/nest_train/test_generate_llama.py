"""Generation in llama.cpp: the token ids and the answers of transformers, and errors with names."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.evaluation.parity import TEXTS
from nestpatch.export.adapters import export_gguf_lora
from nestpatch.runtimes import llama_file, text
from nestpatch.runtimes._chat import chat_renderer
from nestpatch.runtimes.llama import LlamaRuntime
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.gguf_files import needs_llama, write_gguf
from tests.varied_packs import varied_pack, with_architecture

pytestmark = needs_llama

PROMPTS = [f"How do I {verb} the {thing}{end}" for verb in ("paint", "open", "sell") for thing in ("bank", "old red fence")
           for end in ("?", ", and why? Tell me in a few words.", "")]  # fmt: skip


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """family -> GGUF file in F32."""
    folder = tmp_path_factory.mktemp("gguf")
    made: dict[str, Path] = {}

    def get(family: str = "llama") -> Path:
        if family not in made:
            made[family] = write_gguf(models(family), folder / f"{family}.gguf")
        return made[family]

    return get


@pytest.mark.parametrize("limit", [512, 9])
def test_prompts_are_the_same_token_ids(models, files, limit):
    _, tokenizer = load_model(models("llama"), "cpu", "float32")
    prompts = [*PROMPTS, *TEXTS, "<|im_start|>user\nspecial<|im_end|>"]
    with LlamaRuntime(files()) as model:
        model.max_prompt_tokens = limit
        assert model.chat_texts(prompts) == text.chat_texts(tokenizer, prompts)
        assert model.token_ids(prompts) == text.prompt_ids(tokenizer, prompts, limit)


def test_without_a_template_prompts_are_lines_and_the_model_frames_them(models, tmp_path, tokenizer):
    base = models("llama")
    (tmp_path / "bare").mkdir()
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    _, loaded = load_model(tmp_path / "bare", "cpu", "float32")
    assert loaded.chat_template is None
    with LlamaRuntime(write_gguf(tmp_path / "bare", tmp_path / "bare.gguf")) as model:
        assert model.chat_texts(["a"]) == ["a\n"]
        assert model.token_ids(PROMPTS) == text.prompt_ids(loaded, PROMPTS, 512)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "mixtral", "qwen3-moe"])
def test_answers_are_those_of_transformers(models, files, family, capfd):
    wanted = TransformersRuntime(*load_model(models(family), "cpu", "float32"), 24).generate(PROMPTS)
    capfd.readouterr()
    events = []
    with LlamaRuntime(files(family), threads=1, max_new_tokens=24) as model:
        answers = model.generate(PROMPTS, on_event=events.append)
        model.batch = 1
        alone = model.generate(PROMPTS)
    assert capfd.readouterr() == ("", "")
    assert answers == wanted
    assert alone == wanted
    assert events[-1].done == events[-1].total == len(PROMPTS)


def test_answers_end_at_an_end_token(files):
    with LlamaRuntime(files(), threads=1) as model:
        assert model.ends(model.end)
        rows = model.token_ids(PROMPTS)
        whole = model.greedy(rows, 16)
        # The fifth word of the first answer, declared to be an end.
        stop = whole[0][4]
        model.ends = lambda token: token == stop  # type: ignore[method-assign]
        cut = model.greedy(rows, 16)
    assert cut[0] == whole[0][: whole[0].index(stop)]
    for short, long in zip(cut, whole, strict=True):
        assert stop not in short
        assert len(short) <= 16
        assert short[: len(long)] == long[: len(short)]


def test_an_adapter_can_be_switched(models, files, tmp_path):
    pack = varied_pack(models("llama"), ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], scale=1.0)
    export_gguf_lora(pack, tmp_path / "lora.gguf")
    with LlamaRuntime(files(), threads=1, max_new_tokens=8) as model:
        plain = model.generate(PROMPTS)
    with LlamaRuntime(files(), tmp_path / "lora.gguf", threads=1, max_new_tokens=8) as model:
        adapted = model.generate(PROMPTS)
    with LlamaRuntime(files(), threads=1, max_new_tokens=8) as model, model.with_adapter(tmp_path / "lora.gguf") as other:
        assert model.generate(PROMPTS) == plain
        assert other.generate(PROMPTS) == adapted
        assert model.generate(PROMPTS) == plain
    assert adapted != plain


def test_long_prompts_are_computed_in_pieces(models, files):
    """More tokens than llama.cpp takes at once, in one prompt and over several."""
    rows = [[3 + (i * k) % 300 for i in range(200)] for k in (1, 2, 3, 5, 7)]
    with LlamaRuntime(files(), threads=1) as model:
        together, alone = model.greedy(rows, 8), [model.greedy([row], 8)[0] for row in rows]
        whole = model.logits([i for row in rows for i in row][:700])
        assert whole.shape == (700, 320)
    assert together == alone


def test_files_that_are_no_models_are_refused(models, files, tmp_path, capfd):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nonsense")
    with pytest.raises(CheckpointFormatError, match=r"llama.cpp cannot load .*broken.gguf: "):
        LlamaRuntime(tmp_path / "broken.gguf")
    with pytest.raises(CheckpointFormatError, match="there is no model file"):
        LlamaRuntime(tmp_path / "none.gguf")
    with pytest.raises(CheckpointFormatError, match="there is no adapter file"):
        LlamaRuntime(files(), tmp_path / "none.gguf")
    with pytest.raises(CheckpointFormatError, match=r"cannot load the adapter .*llama.gguf"):
        LlamaRuntime(files(), files())
    pack = varied_pack(models("llama"), ["model.layers.0.mlp.up_proj.weight"])
    export_gguf_lora(with_architecture(pack, "Qwen2ForCausalLM"), tmp_path / "other.gguf")
    with pytest.raises(CheckpointFormatError, match="arch mismatch"):
        LlamaRuntime(files(), tmp_path / "other.gguf")
    assert capfd.readouterr() == ("", "")


def test_a_log_callback_of_somebody_else_in_this_process_does_no_harm(files, tmp_path):
    import llama_cpp

    heard: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, line, _: heard.append(line))
    llama_cpp.llama_log_set(callback, None)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointFormatError, match=r"llama.cpp cannot load .*broken.gguf: "):
        LlamaRuntime(tmp_path / "broken.gguf")
    with LlamaRuntime(files()) as model:
        assert model.logits([3, 4, 5]).shape == (3, model.vocabulary)
    assert not heard


def test_closing_twice_does_no_harm(files):
    model = LlamaRuntime(files())
    model.close()
    model.close()


@pytest.mark.parametrize(
    "template",
    ["{% for", "{{ raise_exception('no') }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}",
     "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ nothing.at.all }}"],
)  # fmt: skip
def test_templates_that_do_not_work_are_refused(template):
    with pytest.raises(CheckpointFormatError, match="chat template does not work"):
        chat_renderer(template, {})("x")


def test_templates_give_what_transformers_gives():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% set ns = namespace(n=1) %}\n{{ bos_token }}{{ missing }}{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n"
        "{% generation %}{{ m['content'] | tojson(indent=2) }} {{ ns.n }}{% endgeneration %}\n"
        "{% if loop.last %}{% break %}{% endif %}\n{% endfor %}\n{% if tools %}no{% endif %}"
        "{% if add_generation_prompt %}<|a|>{% endif %}"
    )
    prompt = "<b> & \u00e9 \"quoted\" 'text'"
    wanted, _ = render_jinja_template(
        [[{"role": "user", "content": prompt}]], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert chat_renderer(template, {"bos_token": "<s>"})(prompt) == wanted[0]


def test_a_template_that_makes_nothing_of_a_prompt_is_refused(files, monkeypatch):
    with LlamaRuntime(files()) as model:
        monkeypatch.setattr(model, "metadata", lambda key: "{# nothing #}" if key.endswith("template") else None)
        with pytest.raises(CheckpointFormatError, match="turns a prompt into an empty text"):
            model.generate(["x"])


def test_without_llama_cpp_the_way_out_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_file.library.cache_clear()
    try:
        with pytest.raises(MissingExtraError) as caught:
            LlamaRuntime(files())
    finally:
        llama_file.library.cache_clear()
    assert caught.value.advice == "pip install 'nestpatch[llama]'"


def test_metadata_of_any_length_is_read_whole(files):
    with LlamaRuntime(files()) as model:
        assert model.metadata("general.architecture") == "llama"
        assert model.metadata("no.such.key") is None
        assert model.token_text("bos") == "<|im_start|>"
        assert model.token_text("seperator") is None
        fields = gguf.GGUFReader(files()).fields
        assert model.metadata("tokenizer.chat_template") == fields["tokenizer.chat_template"].contents()
