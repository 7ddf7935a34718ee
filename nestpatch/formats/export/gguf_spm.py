"""Vocabularies of the sentencepiece kind: BPE by scores over characters, with bytes for what has no piece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.export.sentencepiece_model import BPE, Kind, Piece, read_model
from nestpatch.formats.export.tokenizer_files import TokenizerFiles

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNREACHABLE = -1e6
"""The score of pieces that no merge makes."""


def pieces(files: TokenizerFiles) -> tuple[Mapping[int, Piece], bool, tuple[str, ...]]:
    """(pieces by id, whether a space is put before text, notes), from tokenizer.model or rebuilt from tokenizer.json.

    Raises UnsupportedModelError for vocabularies that llama.cpp would read otherwise, CheckpointFormatError without any.
    """
    found: Mapping[int, Piece]
    notes: tuple[str, ...] = ()
    if files.model_file.is_file():
        model = read_model(files.model_file)
        if model.model_type != BPE:
            raise _refused("a unigram model")
        found, prefix = dict(enumerate(model.pieces)), model.add_dummy_prefix
    elif files.tokenizer is not None:
        found, notes = _rebuilt(files.tokenizer)
        prefix = False
    else:
        raise CheckpointFormatError(
            f"{files.folder} has no tokenizer", advice="Put tokenizer.json or tokenizer.model into the model's directory."
        )
    if sum(piece.kind is Kind.BYTE for piece in found.values()) != 256:
        # Its tokenizer throws an exception at the first character without a piece.
        raise _refused("no byte fallback")
    if files.tokenizer is not None:
        prefix = _prefix(files.tokenizer)
    if isinstance(said := files.config.get("add_prefix_space"), bool):
        prefix = said
    return found, prefix, (*notes, *(_prefix_note(files) if prefix else ()))


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp cannot read this tokenizer: {what}",
        advice="Let llama.cpp's own converter try: --llama-cpp DIR, where DIR is a checkout of llama.cpp.",
    )


def _prefix_note(files: TokenizerFiles) -> tuple[str, ...]:
    """llama.cpp has one way to put spaces before text; newer tokenizers have another."""
    schemes = {step.get("prepend_scheme") for step in _flat((files.tokenizer or {}).get("pre_tokenizer"), "pretokenizers")}
    # These classes rebuild their steps from the flag, whatever tokenizer.json says.
    by_flag = files.tokenizer is None or str(files.config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    if "first" in schemes or (by_flag and files.config.get("legacy") is not True):
        return ("llama.cpp puts a space after every special token inside a text, this tokenizer only at the beginning",)
    return ()


def _prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before text. Raises UnsupportedModelError for steps that llama.cpp does not have."""
    prefix = False
    for step in _flat(tokenizer.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif not (kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE):
            raise _refused(f"it normalizes text by {kind}")
    for step in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Metaspace" and step.get("replacement") == SPACE:
            prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        elif not (kind == "Split" and step.get("pattern") == {"String": " "}):
            # Splitting at spaces does nothing: the normalizer has replaced them all.
            raise _refused(f"it splits text by {kind}")
    return prefix


def _flat(step: Any, key: str) -> Sequence[Mapping[str, Any]]:
    return [part for part in (step or {}).get(key, [step]) if part]


def _rebuilt(tokenizer: Mapping[str, Any]) -> tuple[dict[int, Piece], tuple[str, ...]]:
    """The pieces of what was once a sentencepiece model: the earlier a merge, the higher the score of its result."""
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise _refused(f"type {model.get('type')}, byte fallback {bool(model.get('byte_fallback'))}")
    vocab: Mapping[str, int] = model["vocab"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    unknown = model.get("unk_token")
    found = {
        number: Piece(text, float(-ranks[text]) if text in ranks else UNREACHABLE, _kind(text, unknown))
        for text, number in vocab.items()
    }
    return found, _ambiguity(vocab, set(pairs))


def _kind(text: str, unknown: str | None) -> Kind:
    if _BYTE.fullmatch(text):
        return Kind.BYTE
    return Kind.UNKNOWN if text == unknown else Kind.NORMAL


def _ambiguity(vocab: Mapping[str, int], merges: set[Any]) -> tuple[str, ...]:
    """llama.cpp merges any two pieces whose whole is a piece; a tokenizer that was trained as BPE knows one pair for each."""
    for text in vocab:
        if _BYTE.fullmatch(text):
            continue
        for at in range(1, len(text)):
            pair = text[:at], text[at:]
            if pair[0] in vocab and pair[1] in vocab and pair not in merges and _made(text, merges):
                return ("this vocabulary was not made by sentencepiece: llama.cpp may split some words otherwise",)
    return ()


def _made(text: str, merges: set[Any]) -> bool:
    """Whether any merge makes this piece; others are added tokens, which are found before merging."""
    return any((text[:at], text[at:]) in merges for at in range(1, len(text)))
