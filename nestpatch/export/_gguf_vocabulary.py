"""The two kinds of vocabularies that llama.cpp reads: byte-level BPE, with named rules to split text, and sentencepiece."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._model_config import OTHER_CONVERTER
from nestpatch.export._tokenizer_files import BPE, TokenizerFiles, VocabularyPiece, read_model
from nestpatch.files.reading import MAX_JSON, read_json, read_text
from nestpatch.formats.gguf.vocabulary import DIGITS, GPT2, PRE_TOKENIZERS, QWEN2, SPACE, Kind

UNREACHABLE = -1e6
"""The score of pieces that no merge produces."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_BY_CLASS: dict[str, tuple[str, ...]] = {"Qwen2Tokenizer": (QWEN2,), "GPT2Tokenizer": (GPT2,)}
"""Splits of classes whose tokenizers may be stored as vocab.json and merges.txt."""


def is_byte_level(files: TokenizerFiles) -> bool:
    """Whether this is a byte-level BPE, by the pre-tokenizer of tokenizer.json or by its files.

    Args:
        files: The tokenizer's files.
    """
    if files.tokenizer is None:
        return (files.folder / "vocab.json").is_file() and (files.folder / "merges.txt").is_file()
    return any(step.get("type") == "ByteLevel" for step in _steps(files.tokenizer, "pre_tokenizer"))


def _steps(tokenizer: Mapping[str, Any] | None, part: str) -> Sequence[Mapping[str, Any]]:
    """The steps of the "normalizer" or the "pre_tokenizer", which may be one step or a sequence."""
    first = (tokenizer or {}).get(part) or {}
    steps = first.get("normalizers" if part == "normalizer" else "pretokenizers", [first])
    return [step for step in steps if step]


def pre_tokenizer(files: TokenizerFiles) -> str:
    """The rules by which a tokenizer splits text.

    Args:
        files: The tokenizer's files.

    Returns:
        llama.cpp's name of the rules.

    Raises:
        UnsupportedModelError: llama.cpp does not have these rules.
    """
    if files.tokenizer is None:
        name = str(files.config.get("tokenizer_class", "")).removesuffix("Fast")
        splits, whole = _BY_CLASS.get(name, ()), False
    else:
        splits = tuple(_splits(files.tokenizer))
        whole = bool(files.tokenizer["model"].get("ignore_merges"))
    found = PRE_TOKENIZERS.get((splits, whole))
    if found is None:
        seen = ", then ".join(splits) or f"those of tokenizer class {files.config.get('tokenizer_class')!r}"
        raise UnsupportedModelError(
            f"the tokenizer splits text by rules that match no known pre-tokenizer of llama.cpp: {seen}"
            + (" (with ignore_merges)" if whole else ""),
            advice=OTHER_CONVERTER,
        )
    return found


def _splits(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    for step in _steps(tokenizer, "pre_tokenizer"):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        if kind == "Split" and plain and "Regex" in pattern:
            yield pattern["Regex"]
        elif kind == "Digits" and step.get("individual_digits"):
            yield DIGITS
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                yield GPT2
        else:
            yield f"{kind} {dict(step)}"


def byte_level_notes(files: TokenizerFiles) -> tuple[str, ...]:
    """How llama.cpp reads a byte-level tokenizer differently.

    Args:
        files: The tokenizer's files.

    Returns:
        Sentences for the user about small differences.

    Raises:
        UnsupportedModelError: A difference changes ordinary text.
    """
    model = (files.tokenizer or {}).get("model", {})
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedModelError(
            f"tokenizers of type {model.get('type')} cannot be exported to GGUF", advice=OTHER_CONVERTER
        )
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout") if model.get(name)]
    if odd:
        raise _refused(f"it is a byte-level BPE with {' and '.join(odd)}")
    kinds = [step.get("type") for step in _steps(files.tokenizer, "normalizer")]
    if set(kinds) - {"NFC"}:
        raise _refused(f"it normalizes text by {', '.join(map(str, kinds))}")
    if kinds or (files.tokenizer is None and "Qwen2" in str(files.config.get("tokenizer_class"))):
        return ("llama.cpp does not compose characters (NFC): text with separate accents becomes other tokens",)
    return ()


def vocabulary(files: TokenizerFiles) -> tuple[Mapping[str, int], list[str]]:
    """Reads the vocabulary of a byte-level BPE.

    Args:
        files: The tokenizer's files.

    Returns:
        (token -> id, merges in order as "a b").

    Raises:
        CheckpointFormatError: A file is broken.
    """
    try:
        if files.tokenizer is not None:
            model = files.tokenizer["model"]
            return model["vocab"], [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        lines = read_text(files.folder / "merges.txt", MAX_JSON).split("\n")
        merges = [line.rstrip("\r") for number, line in enumerate(lines) if line and not (number == 0 and line.startswith("#"))]
        return read_json(files.folder / "vocab.json"), merges
    except (KeyError, TypeError, AttributeError, OSError, UnicodeDecodeError) as error:
        raise CheckpointFormatError(f"the tokenizer of {files.folder} is broken: {error!r}") from error


def pieces(files: TokenizerFiles) -> tuple[Mapping[int, VocabularyPiece], bool, tuple[str, ...]]:
    """Reads a sentencepiece vocabulary, from tokenizer.model or rebuilt from tokenizer.json.

    Args:
        files: The tokenizer's files.

    Returns:
        (pieces by id, whether a space is put before text, notes for the user).

    Raises:
        UnsupportedModelError: llama.cpp would read the vocabulary differently.
        CheckpointFormatError: There is no vocabulary.
    """
    found: Mapping[int, VocabularyPiece]
    notes: tuple[str, ...] = ()
    if (file := files.folder / "tokenizer.model").is_file():
        model = read_model(file)
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
        # llama.cpp throws an exception at the first character without a piece.
        raise _refused("no byte fallback")
    if files.tokenizer is not None:
        prefix = _prefix(files.tokenizer)
    if isinstance(stated := files.config.get("add_prefix_space"), bool):
        prefix = stated
    return found, prefix, (*notes, *(_prefix_note(files) if prefix else ()))


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"llama.cpp cannot read this tokenizer: {what}", advice=OTHER_CONVERTER)


def _prefix_note(files: TokenizerFiles) -> tuple[str, ...]:
    """llama.cpp has one way to put spaces before text; newer tokenizers have another."""
    schemes = {step.get("prepend_scheme") for step in _steps(files.tokenizer, "pre_tokenizer")}
    # These classes rebuild their steps from the flag and ignore those in tokenizer.json.
    by_flag = files.tokenizer is None or str(files.config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    if "first" in schemes or (by_flag and files.config.get("legacy") is not True):
        return ("llama.cpp puts a space after every special token inside a text, this tokenizer only at the beginning",)
    return ()


def _prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before text. Raises UnsupportedModelError for steps that llama.cpp does not have."""
    prefix = False
    for step in _steps(tokenizer, "normalizer"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif not (kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE):
            raise _refused(f"it normalizes text by {kind}")
    for step in _steps(tokenizer, "pre_tokenizer"):
        kind = step.get("type")
        if kind == "Metaspace" and step.get("replacement") == SPACE:
            prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        elif not (kind == "Split" and step.get("pattern") == {"String": " "}):
            # Splitting at spaces has no effect: the normalizer has replaced all of them.
            raise _refused(f"it splits text by {kind}")
    return prefix


def _rebuilt(tokenizer: Mapping[str, Any]) -> tuple[dict[int, VocabularyPiece], tuple[str, ...]]:
    """The pieces of a former sentencepiece model: the earlier a merge, the higher the score of its result."""
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise _refused(f"type {model.get('type')}, byte fallback {bool(model.get('byte_fallback'))}")
    vocab: Mapping[str, int] = model["vocab"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    found = {}
    for text, number in vocab.items():
        kind = Kind.UNKNOWN if text == model.get("unk_token") else Kind.NORMAL
        kind = Kind.BYTE if _BYTE.fullmatch(text) else kind
        found[number] = VocabularyPiece(text, float(-ranks[text]) if text in ranks else UNREACHABLE, kind)
    return found, _ambiguity(vocab, set(pairs))


def _ambiguity(vocab: Mapping[str, int], merges: set[Any]) -> tuple[str, ...]:
    """llama.cpp merges any two pieces that form a piece; a tokenizer trained as BPE has one pair for each piece."""
    for text in vocab:
        if _BYTE.fullmatch(text):
            continue
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        unused = any(left in vocab and right in vocab and (left, right) not in merges for left, right in pairs)
        # A piece that no merge makes is an added token, which is matched before merging.
        if unused and any(pair in merges for pair in pairs):
            return ("this vocabulary was not made by sentencepiece: llama.cpp may split some words differently",)
    return ()
