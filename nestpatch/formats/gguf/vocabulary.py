"""What a GGUF file says of a tokenizer: kinds of tokens, keys of the special ones, and the named rules that split text.

Both directions use these tables: `export` writes a vocabulary, `formats/gguf/hf` reads one.
"""

from __future__ import annotations

from enum import IntEnum

SPACE = "\u2581"
"""How sentencepiece writes a space."""
SPECIALS = ("bos", "eos", "unk", "sep", "pad", "mask")
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the spelling of the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
"""Kind of special token -> its key below tokenizer.ggml."""
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
"""The chat template; named ones follow with a dot and their name."""
PHI3 = ("phi-3", "phi3")
"""In the model's name: llama.cpp then strips white space after special tokens, and requires "</s>"."""

END_KEYS = ("eot_token_id", "eom_token_id")
"""Keys of more tokens that end an answer, of a turn and of a message."""
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>",
)  # fmt: skip
"""Tokens that end an answer in llama.cpp by their text, whatever the file says."""


class Kind(IntEnum):
    """Kinds of pieces, with the numbers that sentencepiece and GGUF share."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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
"""(splits, whether whole words skip merging) -> llama.cpp's name of the rules.

llama.cpp's converter finds the name by the token ids of a fixed text, llama.cpp itself has a few rules under many names. So the
rules decide here: single digits before GPT-2's split are smollm's, whatever the model is."""
_SAME: dict[str, tuple[str, ...]] = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "dbrx": ("smaug-bpe", "chatglm-bpe", "glm4"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "kormo", "hunyuan", "megrez"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "gigachat", "mellum", "a.x-4.0"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
"""Name of rules -> other names that llama.cpp has for the same rules."""
BEGIN_BY_RULE = ("llama-bpe", "tekken")
"""Rules with which llama.cpp puts BOS before every text, unless the file says otherwise."""
RULES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    other: (name, splits, whole) for (splits, whole), name in PRE_TOKENIZERS.items() for other in (name, *_SAME.get(name, ()))
}
"""Every known tokenizer.ggml.pre -> (its name in PRE_TOKENIZERS, splits, whether whole words skip merging)."""
