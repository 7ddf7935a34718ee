"""The files of a tokenizer from a GGUF file's vocabulary: the way back of export/_gguf_tokenizer.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.gguf.header import read_arrays
from nestpatch.formats.gguf.hf._facts import FileFacts
from nestpatch.formats.gguf.vocabulary import (
    BEGIN_BY_RULE,
    DIGITS,
    END_KEYS,
    END_TEXTS,
    GPT2,
    ID_KEYS,
    PHI3,
    PREFIX,
    RULES,
    SPACE,
    SPECIALS,
    TEMPLATE,
    Kind,
)

_COMPOSED = "qwen2"
"""Rules of models whose tokenizers compose characters (NFC), which llama.cpp leaves to its caller."""
_UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
"""The tokens of Phi-3 after which llama.cpp keeps white space."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)
_LONGEST = 256
"""Characters of a sentencepiece token that is merged: trainers allow some dozen."""
_FLAGS = {"single_word": False, "lstrip": False, "normalized": False}


@dataclass(frozen=True, eq=False)
class ReadTokenizer:
    """A tokenizer of transformers."""

    files: Mapping[str, bytes]
    """By their names in the directory."""
    ids: Mapping[str, int | None]
    """bos_token_id, eos_token_id and pad_token_id for config.json."""
    ends: list[int]
    """All tokens that end an answer."""


@dataclass(frozen=True, eq=False)
class _Table:
    """The vocabulary of the file, checked."""

    where: str
    texts: list[str]
    kinds: list[int]
    specials: Mapping[str, int]
    """Kind of special token -> id."""
    strips: bool
    """Whether llama.cpp strips white space after special tokens."""

    def vocab(self) -> dict[str, int]:
        """Text -> id, without the ids that only fill up the embeddings."""
        return {text: number for number, text in enumerate(self.texts) if self.kinds[number] != Kind.UNUSED}

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are matched before a text is split."""
        found = []
        for number, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True)):
            if kind in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN):
                special = kind != Kind.USER_DEFINED
                strip = self.strips and special and text not in _UNSTRIPPED
                found.append({"id": number, "content": text, **_FLAGS, "rstrip": strip, "special": special})
        return found

    def text(self, kind: str) -> str | None:
        number = self.specials.get(kind)
        return None if number is None else self.texts[number]


def read_tokenizer(facts: FileFacts, path: Path, rows: int) -> ReadTokenizer:
    """Reads the tokenizer of a GGUF file.

    Args:
        facts: Its metadata.
        path: The file.
        rows: Rows of the embeddings.

    Returns:
        The files that transformers reads.

    Raises:
        UnsupportedModelError: It is of a kind, or splits text by rules, that are not known here.
        CheckpointFormatError: There is none, or it contradicts itself.
    """
    model = facts.text(f":{PREFIX}model", None)
    if model is None:
        raise CheckpointFormatError(
            f"{path} has no tokenizer", advice="Give a GGUF file of a whole language model, or the safetensors model."
        )
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"{path} has a tokenizer of kind {model[:40]!r}; known are gpt2 and llama")
    keys = {name: f"{PREFIX}{name}" for name in ("tokens", "token_type", "scores", "merges")}
    arrays = read_arrays(path, tuple(keys.values()))
    found = {name: arrays.get(key, []) for name, key in keys.items()}
    table = _table(facts, found["tokens"], found["token_type"], rows)
    if model == "gpt2":
        content = _byte_level(facts, table, _strings(found["merges"], "merges", table.where))
    else:
        content = _sentencepiece(facts, table, found["scores"])
    files = {"tokenizer.json": _json(content), "tokenizer_config.json": _json(_config(table)), **_templates(facts)}
    ids = {f"{kind}_token_id": table.specials.get(kind) for kind in ("bos", "eos", "pad")}
    return ReadTokenizer(files, ids, _ends(facts, table))


def _ends(facts: FileFacts, table: _Table) -> list[int]:
    """The tokens at which llama.cpp stops: those that the file names, and those that it knows by their text."""
    named = [table.specials.get("eos"), *(facts.whole(f":{PREFIX}{key}", None) for key in END_KEYS)]
    known = (number for number, text in enumerate(table.texts) if text in END_TEXTS)
    return list(dict.fromkeys(number for number in (*named, *known) if number is not None and number < len(table.texts)))


def _strings(values: list[Any], what: str, where: str) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise CheckpointFormatError(f"{where} lists {what} that are not texts")
    return values


def _table(facts: FileFacts, texts: list[Any], kinds: list[Any], rows: int) -> _Table:
    texts = _strings(texts, "tokens", facts.where)
    kinds = kinds or [int(Kind.NORMAL)] * len(texts)
    if not texts or len(texts) > rows or len(kinds) != len(texts):
        raise CheckpointFormatError(
            f"{facts.where} has {len(texts)} tokens of {len(kinds)} kinds for {rows} rows of embeddings"
        )
    if not all(kind in Kind._value2member_map_ for kind in kinds):
        raise CheckpointFormatError(f"{facts.where} has a token of an unknown kind")
    used = [text for text, kind in zip(texts, kinds, strict=True) if kind != Kind.UNUSED]
    if len(set(used)) != len(used):
        raise CheckpointFormatError(f"{facts.where} has {len(used) - len(set(used))} tokens with more than one id")
    specials = {}
    for kind in SPECIALS:
        number = facts.whole(f":{PREFIX}{ID_KEYS[kind]}", None)
        if number is not None and number >= len(texts):
            raise CheckpointFormatError(f"{facts.where} names token {number} of {len(texts)} as {kind}")
        if number is not None:
            specials[kind] = number
    name = facts.text(":general.name", "").lower()
    return _Table(facts.where, texts, kinds, specials, any(part in name for part in PHI3))


def _byte_level(facts: FileFacts, table: _Table, merges: list[str]) -> dict[str, Any]:
    """A byte-level BPE with one of the known rules to split text."""
    named = facts.text(f":{PREFIX}pre", "default")
    if named not in RULES:
        raise UnsupportedModelError(
            f"{table.where} splits text by rules that are not known here: {named[:40]!r}",
            advice=f"Known are {', '.join(RULES)}.",
        )
    rule, splits, whole = RULES[named]
    vocab = table.vocab()
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointFormatError(f"{table.where} has a merge of tokens that it does not have: {merge[:80]!r}")
    model = {"type": "BPE", "ignore_merges": whole, "vocab": vocab, "merges": [merge.split(" ", 1) for merge in merges]}
    return {
        "version": "1.0",
        "added_tokens": table.added(),
        "normalizer": {"type": "NFC"} if rule == _COMPOSED else None,
        "pre_tokenizer": _splitting(splits),
        "post_processor": _frame(facts, table, rule in BEGIN_BY_RULE) or _bytes(),
        "decoder": _bytes(),
        "model": model,
    }


def _bytes(*, regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _splitting(splits: tuple[str, ...]) -> dict[str, Any]:
    """The steps that `export` reads as these splits."""
    steps: list[dict[str, Any]] = []
    for split in splits:
        if split == DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif split != GPT2:
            steps.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    steps.append(_bytes(regex=GPT2 in splits))
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


def _frame(facts: FileFacts, table: _Table, begins: bool) -> dict[str, Any] | None:
    """The tokens that are put around every text; None without any."""
    around = {
        kind: (table.text(kind), table.specials.get(kind))
        for kind, default in (("bos", begins), ("eos", False))
        if facts.flag(f":{PREFIX}add_{kind}_token", default)
    }
    tokens = {kind: (text, number) for kind, (text, number) in around.items() if text is not None}
    if not tokens:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": kind}}]
        if "bos" in tokens:
            parts.insert(0, {"SpecialToken": {"id": tokens["bos"][0], "type_id": kind}})
        if "eos" in tokens:
            parts.append({"SpecialToken": {"id": tokens["eos"][0], "type_id": kind}})
        return parts

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in tokens.values()},
    }


def _sentencepiece(facts: FileFacts, table: _Table, scores: list[Any]) -> dict[str, Any]:
    """A sentencepiece BPE: the higher the score of a piece, the earlier the merges that make it."""
    if len(scores) != len(table.texts) or not all(isinstance(score, (int, float)) for score in scores):
        raise CheckpointFormatError(f"{table.where} has {len(scores)} scores for {len(table.texts)} tokens")
    if sum(kind == Kind.BYTE for kind in table.kinds) != 256:
        raise CheckpointFormatError(f"{table.where} has a tokenizer without a token for every byte")
    prefix = facts.flag(f":{PREFIX}add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    unknown = next((table.texts[n] for n, kind in enumerate(table.kinds) if kind == Kind.UNKNOWN), table.text("unk"))
    return {
        "version": "1.0",
        "added_tokens": table.added(),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _frame(facts, table, begins=True),
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": table.vocab(),
            "merges": _merges(table, scores),
        },
    }


def _merges(table: _Table, scores: list[float]) -> list[list[str]]:
    pieces = {text: number for number, text in enumerate(table.texts) if table.kinds[number] == Kind.NORMAL}
    if any(len(text) > _LONGEST for text in pieces):
        raise CheckpointFormatError(f"{table.where} has tokens of more than {_LONGEST} characters")
    pairs = [
        (-scores[number], number, text[:at], text[at:])
        for text, number in pieces.items()
        for at in range(1, len(text))
        if text[:at] in pieces and text[at:] in pieces
    ]
    return [[left, right] for *_, left, right in sorted(pairs)]


def _config(table: _Table) -> dict[str, Any]:
    """tokenizer_config.json. The class takes tokenizer.json as it is; those of model families would build their own steps."""
    tokens = {f"{kind}_token": text for kind in SPECIALS if (text := table.text(kind)) is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}


def _templates(facts: FileFacts) -> dict[str, bytes]:
    """The chat template, and those with names of their own."""
    found = {}
    if (main := facts.text(f":{TEMPLATE}", None)) is not None:
        found["chat_template.jinja"] = main.encode()
    for name, text in facts.starting(f"{TEMPLATE}.").items():
        if not _NAME.fullmatch(name):
            raise CheckpointFormatError(f"{facts.where} has a chat template of the impossible name {name[:80]!r}")
        found[f"additional_chat_templates/{name}.jinja"] = text.encode()
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
