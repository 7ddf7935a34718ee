"""Byte-level BPE: how the text is split before merging, which llama.cpp must be told by name, and the merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.files import MAX_JSON, read_text
from nestpatch.formats.export.model_config import read_json
from nestpatch.formats.export.tokenizer_files import TokenizerFiles

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_EDGE = r"[^\r\n\p{L}\p{N}]?"

LLAMA3 = rf"{_CONTRACTIONS}|{_EDGE}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|{_EDGE}\p{{L}}+|\p{{N}}|{_TAIL}"
GPT4O = rf"{_EDGE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_EDGE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
TEKKEN = rf"{_EDGE}{_UPPER}*{_LOWER}+|{_EDGE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_TAIL}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = "every digit by itself"

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((GPT4O,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
}
"""(splits, whether whole words skip merging) -> llama.cpp's name. Names with the same splits differ only in that."""
_BY_CLASS: dict[str, tuple[str, ...]] = {"Qwen2Tokenizer": (QWEN2,), "GPT2Tokenizer": (GPT2,)}
"""Classes whose tokenizers may lie there as vocab.json and merges.txt."""


def is_byte_level(files: TokenizerFiles) -> bool:
    """Whether this is a byte-level BPE, by the pre-tokenizer of tokenizer.json or by its files."""
    if files.tokenizer is None:
        return (files.folder / "vocab.json").is_file() and (files.folder / "merges.txt").is_file()
    return any(step.get("type") == "ByteLevel" for step in _steps(files.tokenizer))


def _steps(tokenizer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The pre-tokenizers, one after the other."""
    first = tokenizer.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    return [step for step in steps if step]


def pre_tokenizer(files: TokenizerFiles) -> str:
    """llama.cpp's name of the splits that this tokenizer makes. Raises UnsupportedModelError when it knows none like them."""
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
            f"the tokenizer splits text by rules for which no pre-tokenizer of llama.cpp is known here: {seen}"
            + (" (with ignore_merges)" if whole else ""),
            advice="Let llama.cpp's own converter try: --llama-cpp DIR, where DIR is a checkout of llama.cpp.",
        )
    return found


def _splits(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    for step in _steps(tokenizer):
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


def check(files: TokenizerFiles) -> tuple[str, ...]:
    """What llama.cpp does otherwise, in words. Raises UnsupportedModelError for what would change ordinary text."""
    model = (files.tokenizer or {}).get("model", {})
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedModelError(f"tokenizers of type {model.get('type')} cannot be exported to GGUF here")
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout") if model.get(name)]
    if odd:
        raise UnsupportedModelError(f"llama.cpp has no byte-level BPE with {' and '.join(odd)}")
    first = (files.tokenizer or {}).get("normalizer") or {}
    kinds = [step.get("type") for step in first.get("normalizers", [first]) if step]
    if set(kinds) - {"NFC"}:
        raise UnsupportedModelError(f"llama.cpp does not normalize text as this tokenizer does ({', '.join(map(str, kinds))})")
    if kinds or (files.tokenizer is None and "Qwen2" in str(files.config.get("tokenizer_class"))):
        return ("llama.cpp does not compose characters (NFC): text with separate accents becomes other tokens",)
    return ()


def vocabulary(files: TokenizerFiles) -> tuple[Mapping[str, int], list[str]]:
    """(token -> id, merges in order as "a b"). Raises CheckpointFormatError when a file is broken."""
    try:
        if files.tokenizer is not None:
            model = files.tokenizer["model"]
            return model["vocab"], [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        lines = read_text(files.folder / "merges.txt", MAX_JSON).split("\n")
        merges = [line.rstrip("\r") for number, line in enumerate(lines) if line and not (number == 0 and line.startswith("#"))]
        return read_json(files.folder / "vocab.json"), merges
    except (KeyError, TypeError, AttributeError, OSError, UnicodeDecodeError) as error:
        raise CheckpointFormatError(f"the tokenizer of {files.folder} is broken: {error!r}") from error
