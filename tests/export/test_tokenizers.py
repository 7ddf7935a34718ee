"""Vocabularies: the same token ids in llama.cpp as in transformers, on texts that tokenizers trip over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._gguf_tokenizer import read_vocabulary
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.export._model_config import model_name
from nestpatch.export._tokenizer_files import read_model
from nestpatch.formats.gguf.vocabulary import Kind
from nestpatch.formats.opening import open_checkpoint
from tests.export.families import model_around
from tests.export.running import loaded, token_ids
from tests.export.tokenizers_made import (
    CHAT,
    GPT4O,
    LLAMA3,
    NASTY,
    QWEN2,
    SPECIALS,
    TEKKEN,
    UNCASED,
    byte_level,
    edit,
    sentencepiece,
)

KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "llama3": ("llama-bpe", lambda folder: byte_level(folder, LLAMA3, whole_words=True)),
    "llama3_merging": ("dbrx", lambda folder: byte_level(folder, LLAMA3)),
    "qwen2": ("qwen2", lambda folder: byte_level(folder, QWEN2)),
    "gpt2": ("gpt-2", lambda folder: byte_level(folder, "gpt2")),
    "digits": ("smollm", lambda folder: byte_level(folder, "digits")),
    "gpt4o": ("gpt-4o", lambda folder: byte_level(folder, GPT4O)),
    "tekken": ("tekken", lambda folder: byte_level(folder, TEKKEN, whole_words=True)),
    "llama_spm": ("default", lambda folder: sentencepiece(folder, "llama")),
    "gemma_spm": ("default", lambda folder: sentencepiece(folder, "gemma")),
}


def export(folder: Path) -> Path:
    return write_gguf(open_checkpoint(folder), folder.with_suffix(".gguf")).output


def facts(folder: Path, rows: int = 480, name: str = "model") -> dict[str, Any]:
    return {key.removeprefix("tokenizer.ggml."): value for key, value in read_vocabulary(folder, rows, name).facts.items()}


def ids_in_llama_cpp(path: Path, texts: tuple[str, ...], *, framed: bool) -> list[list[int]]:
    pytest.importorskip("llama_cpp")
    with loaded(path, 32) as model:
        return [token_ids(model, text, framed=framed) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    pre, train = KINDS[kind]
    folder = model_around(tmp_path / kind)
    train(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    path = export(folder)
    assert facts(folder)["pre"] == pre
    for framed in (True, False):
        for text, found in zip(NASTY, ids_in_llama_cpp(path, NASTY, framed=framed), strict=True):
            if kind in ("gpt4o", "tekken") and UNCASED in text:
                continue  # llama.cpp takes only a-z and A-Z for cased there
            assert found == tokenizer(text, add_special_tokens=framed).input_ids, (text, framed)


def test_token_ids_from_tokenizer_model_are_those_of_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece as spm

    folder = model_around(tmp_path / "model")
    sentencepiece(folder, "model")
    reference = spm.SentencePieceProcessor(str(folder / "tokenizer.model"))
    # Control tokens are text to sentencepiece, and llama.cpp looks for some that are written like them.
    texts = tuple(text for text in NASTY if "<|" not in text)
    for text, found in zip(texts, ids_in_llama_cpp(export(folder), texts, framed=True), strict=True):
        assert found == [reference.bos_id(), *reference.encode(text)], text


def test_a_sentencepiece_model_is_read_as_its_library_reads_it(tmp_path: Path) -> None:
    import sentencepiece as spm

    sentencepiece(tmp_path, "model")
    ours, theirs = read_model(tmp_path / "tokenizer.model"), spm.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert (ours.model_type, ours.add_dummy_prefix) == (2, True)
    assert [piece.text for piece in ours.pieces] == [theirs.IdToPiece(n) for n in range(theirs.GetPieceSize())]
    assert [piece.score for piece in ours.pieces] == [theirs.GetScore(n) for n in range(theirs.GetPieceSize())]
    assert [piece.kind is Kind.BYTE for piece in ours.pieces] == [theirs.IsByte(n) for n in range(theirs.GetPieceSize())]
    assert [piece.kind is Kind.CONTROL for piece in ours.pieces] == [theirs.IsControl(n) for n in range(theirs.GetPieceSize())]


@pytest.mark.parametrize("damage", [lambda d: d[:-3], lambda d: b"\xff" * 40, lambda d: b"", lambda d: d[7:]])
def test_a_broken_sentencepiece_model_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    sentencepiece(tmp_path, "model")
    file = tmp_path / "tokenizer.model"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointFormatError, match="not a sentencepiece model"):
        read_model(file)


def test_vocab_and_merges_files_are_read_like_tokenizer_json(tmp_path: Path) -> None:
    byte_level(tmp_path, QWEN2)
    want = facts(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = {str(token["id"]): token for token in content["added_tokens"]}
    edit(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "add_bos_token": True},
    )
    assert facts(tmp_path) == want
    edit(tmp_path / "tokenizer_config.json", {"tokenizer_class": "OtherTokenizer"})
    with pytest.raises(UnsupportedModelError, match="OtherTokenizer"):
        facts(tmp_path)


@pytest.mark.parametrize("where", ["jinja", "config", "several"])
def test_the_chat_template_survives(where: str, tmp_path: Path) -> None:
    folder = model_around(tmp_path / "chat")
    byte_level(folder, QWEN2)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == CHAT
    want: dict[str, Any] = {"tokenizer.chat_template": CHAT}
    if where == "config":
        (folder / "chat_template.jinja").unlink()
        edit(folder / "tokenizer_config.json", {"chat_template": CHAT})
    if where == "several":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool use.jinja").write_text("{{ tools }}", encoding="utf-8")
        want |= {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_templates": ["tool_use"]}
    fields = {key: field.contents() for key, field in GGUFReader(export(folder)).fields.items() if "chat" in key}
    assert fields == want


def test_special_tokens_and_what_is_added(tmp_path: Path) -> None:
    byte_level(tmp_path, QWEN2)
    found = facts(tmp_path)
    assert [found[key] for key in ("bos_token_id", "eos_token_id", "padding_token_id")] == [0, 1, 0]
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert [found["token_type"][n] for n in range(4)] == [Kind.CONTROL] * 4
    edit(tmp_path / "tokenizer.json", {"post_processor": None})
    assert facts(tmp_path)["add_bos_token"] is False
    edit(tmp_path / "tokenizer_config.json", {"add_eos_token": True, "bos_token": None, "eos_token": {"content": "<|user|>"}})
    found = facts(tmp_path)
    assert (found["add_eos_token"], found["eos_token_id"]) == (True, 2)
    assert "bos_token_id" not in found
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": [3, 1]}', encoding="utf-8")
    assert facts(tmp_path)["bos_token_id"] == 3


def test_added_tokens_by_kind(tmp_path: Path) -> None:
    """Special ones and those that look it are control tokens; others are found in any text, with spaces as they are there."""
    byte_level(tmp_path, QWEN2)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    more = [{"id": 480, "content": "<tool>", "special": False}, {"id": 481, "content": "<|fim|>", "special": False}]
    more += [{"id": 482, "content": "▁▁", "special": False}, {"id": 599, "content": "<beyond>", "special": True}]
    edit(tmp_path / "tokenizer.json", {"added_tokens": content["added_tokens"] + more})
    vocabulary = read_vocabulary(tmp_path, 490, "model")
    texts, kinds = (vocabulary.facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert texts[480:484] == ["<tool>", "<|fim|>", "  ", "[PAD483]"]  # type: ignore[index]
    assert kinds[480:484] == [Kind.USER_DEFINED, Kind.CONTROL, Kind.USER_DEFINED, Kind.UNUSED]  # type: ignore[index]
    assert len(texts) == len(kinds) == 490  # type: ignore[arg-type]
    assert any("1 tokens" in note for note in vocabulary.notes)


def split_by(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}


UNKNOWN = [
    ({"pre_tokenizer": split_by(r"\w+|\W+")}, r"\\w\+\|\\W\+"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "ByteLevel"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"post_processor": {"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}}, "BertProcessing"),
]


@pytest.mark.parametrize(("changes", "reason"), UNKNOWN)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    byte_level(tmp_path, QWEN2, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        facts(tmp_path)


def test_the_way_out_of_an_unknown_split_is_named(tmp_path: Path) -> None:
    byte_level(tmp_path, QWEN2, whole_words=True)
    with pytest.raises(UnsupportedModelError, match="ignore_merges") as caught:
        facts(tmp_path)
    assert "--llama-cpp DIR" in caught.value.advice


SPM_REFUSED = [
    (lambda model: model.update(type="Unigram"), "Unigram"),
    (lambda model: model.update(byte_fallback=False), "byte fallback False"),
    (lambda model: [model["vocab"].pop(f"<0x{n:02X}>") for n in range(3)], "no byte fallback"),
]


@pytest.mark.parametrize(("change", "reason"), SPM_REFUSED)
def test_a_vocabulary_that_llama_cpp_reads_otherwise_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    sentencepiece(tmp_path, "llama")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=reason):
        facts(tmp_path)


def test_what_llama_cpp_does_otherwise_is_noted(tmp_path: Path) -> None:
    def notes() -> str:
        return " ".join(read_vocabulary(tmp_path, 480, "model").notes)

    byte_level(tmp_path, QWEN2)
    assert notes() == ""
    edit(tmp_path / "tokenizer.json", {"normalizer": {"type": "NFC"}})
    assert "NFC" in notes()
    (tmp_path / "tokenizer.json").unlink()
    sentencepiece(tmp_path, "llama")
    assert notes() == ""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    edit(tmp_path / "tokenizer.json", {"pre_tokenizer": metaspace, "normalizer": None})
    assert "only at the beginning" in notes()
    assert facts(tmp_path)["add_space_prefix"] is True
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    seen: set[str] = set()
    once = [pair for pair in content["model"]["merges"] if not ("".join(pair) in seen or seen.add("".join(pair)))]  # type: ignore[func-returns-value]
    edit(tmp_path / "tokenizer.json", {"model": {**content["model"], "merges": once}})
    assert "not made by sentencepiece" in notes()


def test_tokens_of_the_same_text_are_refused(tmp_path: Path) -> None:
    byte_level(tmp_path, QWEN2)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    twin = {"id": 480, "content": "a", "special": True}
    edit(tmp_path / "tokenizer.json", {"added_tokens": [*content["added_tokens"], twin]})
    with pytest.raises(CheckpointFormatError, match="more than one id, among them 'a'"):
        facts(tmp_path, rows=481)


def test_names_switch_rules_of_phi3_on(tmp_path: Path) -> None:
    sentencepiece(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match=r"<\|endoftext\|>") as caught:
        facts(tmp_path, name="Tiny-Phi-3")
    assert "--name" in caught.value.advice
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][-1]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert any("phi-3" in note for note in read_vocabulary(tmp_path, 480, "model").notes)


def test_a_model_is_called_as_its_directory_or_repository(tmp_path: Path) -> None:
    assert model_name(tmp_path / "My Model-2.gguf") == "My Model-2.gguf"
    snapshot = tmp_path / "models--org--Some-Model-7B" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "Some-Model-7B"


def test_an_absurd_id_costs_nothing(tmp_path: Path) -> None:
    sentencepiece(tmp_path, "llama")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["absurd"] = 2**60
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert len(facts(tmp_path)["tokens"]) == 480


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = model_around(tmp_path / "model")
    with pytest.raises(CheckpointFormatError, match="has no tokenizer"):
        export(folder)
    for text in ("{", "[]", '{"model": 7}', '{"model": {"vocab": [], "merges": {}}, "pre_tokenizer": {"type": "ByteLevel"}}'):
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises((CheckpointFormatError, UnsupportedModelError)):
            export(folder)
    byte_level(folder, QWEN2)
    edit(folder / "tokenizer.json", {"added_tokens": [{"content": "no id"}]})
    with pytest.raises(CheckpointFormatError, match="added tokens"):
        export(folder)
    assert not list(tmp_path.glob("*.gguf"))


REAL = os.environ.get("NESTPATCH_TOKENIZERS")
CONTROL_IN_LLAMA_CPP = "</s>"
"""llama.cpp takes this text for a control token in every vocabulary that has it."""


@pytest.mark.skipif(not REAL, reason="NESTPATCH_TOKENIZERS names no folder of real tokenizers")
@pytest.mark.parametrize("name", ["llama2", "qwen2.5", "smollm2"])
def test_real_tokenizers(name: str, tmp_path: Path) -> None:
    source = Path(str(REAL)) / name
    rows = {"llama2": 32000, "qwen2.5": 151936, "smollm2": 49152}[name]
    folder = model_around(tmp_path / name, rows)
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    path = export(folder)
    texts = tuple(text for text in NASTY if CONTROL_IN_LLAMA_CPP not in text)
    for text, found in zip(texts, ids_in_llama_cpp(path, texts, framed=False), strict=True):
        assert found == reference_ids(folder, text), text


def reference_ids(folder: Path, text: str) -> list[int]:
    """transformers, or for a lone tokenizer.model the library that defines it."""
    if (folder / "tokenizer.model").is_file():
        import sentencepiece as spm

        return list(spm.SentencePieceProcessor(str(folder / "tokenizer.model")).encode(text))
    import transformers

    return list(transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids)


def test_the_made_tokenizers_know_their_special_tokens(tmp_path: Path) -> None:
    """Else the tests above would compare plain text."""
    byte_level(tmp_path, QWEN2)
    assert facts(tmp_path)["tokens"][:4] == SPECIALS
