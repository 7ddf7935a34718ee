"""The vocabulary of a GGUF file: one text, kind and score for every row of the embeddings, and how texts are framed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export import _gguf_vocabulary as gguf_bpe
from nestpatch.export import _gguf_vocabulary as gguf_spm
from nestpatch.export._tokenizer_files import (
    SPECIALS,
    AddedToken,
    ChatTemplate,
    Kind,
    TokenizerFiles,
    chat_template,
    frame,
    read_tokenizer_files,
)
from nestpatch.formats.gguf.header import Facts

_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the format spells it like this
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_PHI3 = ("phi-3", "phi3")
"""In the model's name: llama.cpp then lets special tokens swallow white space, and needs "</s>"."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Everything under tokenizer.* in a GGUF file."""

    facts: Facts
    notes: tuple[str, ...]
    """What llama.cpp does otherwise than the model's tokenizer."""


def read_vocabulary(folder: Path, rows: int, name: str) -> Vocabulary:
    """The vocabulary of a model whose embeddings have `rows` rows and which will be called `name`.

    Raises UnsupportedModelError when llama.cpp would tokenize otherwise, CheckpointFormatError for missing or broken files.
    """
    files = read_tokenizer_files(folder)
    byte_level = gguf_bpe.is_byte_level(files)
    table = _Table(rows)
    if byte_level:
        notes = gguf_bpe.check(files)
        pre = gguf_bpe.pre_tokenizer(files)
        tokens, merges = gguf_bpe.vocabulary(files)
        for text, number in tokens.items():
            table.put(number, text, Kind.NORMAL)
        facts: Facts = {}
    else:
        pre, merges = "default", []
        pieces, prefix, notes = gguf_spm.pieces(files)
        for number, piece in pieces.items():
            text = piece.text.replace(gguf_spm.SPACE, " ") if piece.kind is Kind.USER_DEFINED else piece.text
            table.put(number, text, piece.kind, piece.score)
        facts = {"add_space_prefix": prefix}
    for number, token in files.added.items():
        table.add(number, token)
    table.finish()
    facts |= _frame_facts(files, table, byte_level)
    facts |= {"model": "gpt2" if byte_level else "llama", "pre": pre, "tokens": table.texts, "token_type": table.kinds}
    facts |= {"merges": merges} if byte_level else {"scores": table.scores}
    full = {f"tokenizer.ggml.{key}": value for key, value in facts.items()} | _template_facts(chat_template(files))
    return Vocabulary(full, notes + table.notes() + _name_notes(name, files, table))


def _template_facts(template: ChatTemplate | None) -> Facts:
    """The chat template; of several, the one called default is the one."""
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {str(one.get("name")): str(one.get("template")) for one in template or ()}
    facts: Facts = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    if named:
        clean = {"".join(c if c.isascii() and c.isalnum() else "_" for c in key): text for key, text in named.items()}
        facts |= {"tokenizer.chat_templates": list(clean)}
        facts |= {f"tokenizer.chat_template.{key}": text for key, text in clean.items()}
    return facts


class _Table:
    """Texts, kinds and scores by id, for as many ids as the embeddings have rows."""

    def __init__(self, rows: int) -> None:
        self.texts = [""] * rows
        self.kinds = [int(Kind.UNUSED)] * rows
        self.scores = [-10000.0] * rows
        self.outside: set[int] = set()

    def put(self, number: int, text: str, kind: Kind, score: float = 0.0) -> None:
        """Sets an entry; ids beyond the embeddings are left out."""
        if not 0 <= number < len(self.texts):
            self.outside.add(number)
            return
        self.texts[number], self.kinds[number], self.scores[number] = text, int(kind), score

    def add(self, number: int, token: AddedToken) -> None:
        """An added token. One that the vocabulary knows as unknown stays that."""
        if 0 <= number < len(self.kinds) and self.kinds[number] == Kind.UNKNOWN:
            return
        if token.special or _looks_special(token.content):
            self.put(number, token.content, Kind.CONTROL, -1000.0)
        else:
            # They are looked for in the raw text, where a space is a space.
            self.put(number, token.content.replace(gguf_spm.SPACE, " "), Kind.USER_DEFINED, -1000.0)

    def finish(self) -> None:
        """Names the unused ids. Raises CheckpointFormatError when two ids have the same text: llama.cpp would not load that."""
        taken = set(self.texts)
        for number, text in enumerate(self.texts):
            if not text:
                pad = f"[PAD{number}]"
                self.texts[number] = pad if pad not in taken else f"[UNUSED_ROW_{number}]"
        self.ids = {text: number for number, text in enumerate(self.texts)}
        if len(self.ids) != len(self.texts):
            twice = [text for number, text in enumerate(self.texts) if self.ids[text] != number]
            raise CheckpointFormatError(f"{len(twice)} tokens have more than one id, among them {twice[0]!r}")

    def notes(self) -> tuple[str, ...]:
        """What had no place."""
        if not self.outside:
            return ()
        return (f"{len(self.outside)} tokens of the tokenizer have no row in the embeddings and were left out",)


def _looks_special(text: str) -> bool:
    """Control tokens that some tokenizers do not call special. llama.cpp then finds them only where it is told to."""
    bars = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(text.startswith(a) and text.endswith(b) for a, b in bars)


def _frame_facts(files: TokenizerFiles, table: _Table, byte_level: bool) -> Facts:
    """Ids of the special tokens, and whether the first and the last are added to every text."""
    facts: Facts = {}
    before, after = frame(files)
    for kind in SPECIALS:
        name = files.special_name(kind)
        number = table.ids.get(name) if name is not None else files.special_id(kind)
        if number is not None and number < len(table.texts):
            facts[_KEYS[kind]] = number
    for kind, framed in (("bos", before), ("eos", after)):
        if framed is not None and framed in table.ids:
            facts[_KEYS[kind]] = table.ids[framed]
        said = files.config.get(f"add_{kind}_token")
        # A sentencepiece model alone says nothing of it; its tokenizers begin with BOS.
        assumed = framed is not None if files.tokenizer is not None else kind == "bos" and not byte_level
        facts[f"add_{kind}_token"] = bool(said if isinstance(said, bool) else assumed) and _KEYS[kind] in facts
    return facts


def _name_notes(name: str, files: TokenizerFiles, table: _Table) -> tuple[str, ...]:
    """llama.cpp switches rules on by the model's name: "phi-3" in it makes special tokens swallow white space behind them.

    Raises UnsupportedModelError where a file of that name could not be loaded.
    """
    called = any(part in name.lower() for part in _PHI3)
    missing = [text for text in ("</s>", "<unk>", "<s>", "<|endoftext|>") if text not in table.ids]
    if called and missing:
        raise UnsupportedModelError(
            f"llama.cpp expects the tokens of Phi-3 in every model that has phi-3 in its name; {name} lacks {missing[0]}",
            advice="Give it another name inside the file: --name NAME",
        )
    strips = any(token.strips for token in files.added.values())
    if strips and not called:
        return ("some tokens swallow white space beside them; llama.cpp does that only for models with phi-3 in their --name",)
    return ()
