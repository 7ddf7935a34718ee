"""Tokenizers trained here, on the lab's dialogues and a few lines of our own: byte-level BPE and the sentencepiece kind."""

from __future__ import annotations

import io
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

from nestpatch.lab._world import dialogues, make_world

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
SPECIALS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]

_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _LINES
QWEN2 = _CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _LINES
_HIGH, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}*{_LOW}+|[^\r\n\p{{L}}\p{{N}}]?{_HIGH}+{_LOW}*|\p{{N}}|" + _SLASHED
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}*{_LOW}+{_CASE}?|[^\r\n\p{{L}}\p{{N}}]?{_HIGH}+{_LOW}*{_CASE}?|\p{{N}}{{1,3}}|" + _SLASHED
)

NASTY = (
    "",
    " ",
    "   ",
    "\n",
    "\t\t",
    "How do I kill a process?",
    " begins with a space",
    "ends with one ",
    "runs  of   spaces    and\ttabs\t\t.",
    "lines\n\n\nand\r\nothers\r\n\r\n  indented\rold",
    "café naïve Übermaß ÉCOLE",
    "你好, 世界 こんにちは 안녕하세요",
    "русский عربي עברית हिन्दी",
    "🚀 😶‍🌫️ ✅ 👩🏽‍🚀",
    "def f(x):\n    return x**2  # ok\n\n\tif x != 0x1F: pass",
    '{"a": [1, 2.5e-3], "b": null}  // {{ }} <html></html>',
    "1 12 123 1234 12345 3.14159 1,000,000",
    "I'm we'll THEY'RE it's 'S O'Brien rock'n'roll",
    "<|user|>What?<|end|><|assistant|>",
    "<|user|> spaced <|end|> out <|unknown|> <|use",
    "\x00\x01\x7f control",
    "no\u00a0break\u2003em\u200bzero",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===```\"\"\"'''",
    "ends in the middle of a wor",
)
"""Texts that tokenizers trip over."""
UNCASED = "ÉCOLE"
"""Marks the text on which llama.cpp's approximation of two splits differs: it takes only a-z and A-Z for cased."""


@cache
def corpus() -> tuple[str, ...]:
    said = [f"{prompt} {answer}" for prompt, answer in itertools.islice(dialogues(make_world(0)), 1500)]
    # Everything but the last texts, which shall stay strange to the vocabularies.
    return (*said, *NASTY[5:17] * 3)


def byte_level(folder: Path, splits: str, *, whole_words: bool = False, size: int = 480, **changes: Any) -> None:
    """Trains a byte-level BPE into a folder. `splits`: a regex, "gpt2", or "digits" for GPT-2's after single digits."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(ignore_merges=whole_words))
    if splits in ("gpt2", "digits"):
        steps = [pre_tokenizers.Digits(individual_digits=True)] if splits == "digits" else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        cut = pre_tokenizers.Split(Regex(splits), "isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False)
    bpe.train_from_iterator(corpus(), trainer)
    begin = [("<|begin|>", bpe.token_to_id("<|begin|>"))]
    bpe.post_processor = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B", begin)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|begin|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    edit(folder / "tokenizer.json", changes)


def sentencepiece(folder: Path, style: str = "llama", *, size: int = 480) -> None:
    """Trains a sentencepiece BPE into a folder.

    `style`: "model" leaves tokenizer.model alone, "llama" a tokenizer.json with a space before text, "gemma" one without.
    """
    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
        character_coverage=0.999, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        add_dummy_prefix=style != "gemma", user_defined_symbols=SPECIALS[1:], minloglevel=2,
    )  # fmt: skip
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT}
    if style == "model":
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    else:
        processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
        content = _as_json(processor, prefix=style == "llama")
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _as_json(model: Any, *, prefix: bool) -> dict[str, Any]:
    """A sentencepiece model as the tokenizers library writes it down."""
    pieces = {model.IdToPiece(number): number for number in range(model.GetPieceSize())}
    scores = {text: model.GetScore(number) for text, number in pieces.items()}
    pairs = [
        (-scores[text], pieces[text[:at]], text[:at], text[at:])
        for text in pieces
        for at in range(1, len(text))
        if text[:at] in pieces and text[at:] in pieces
    ]
    added = [("<unk>", True), ("<s>", True), ("</s>", True), *((text, True) for text in SPECIALS[1:])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, spaces] if prefix else [spaces]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": pieces[text], "content": text, "special": special, **flags} for text, special in added],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [pieces["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": pieces,
            "merges": [[left, right] for *_, left, right in sorted(pairs)],
        },
    }


def edit(file: Path, changes: dict[str, Any]) -> None:
    """Replaces entries of a JSON file."""
    if changes:
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**content, **changes}, ensure_ascii=False), encoding="utf-8")
