"""The tokenizer in a GGUF file: one text, kind and score for every row of the embeddings, and the tokens around a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._gguf_vocabulary import byte_level_notes, is_byte_level, pieces, pre_tokenizer, vocabulary
from nestpatch.export._tokenizer_files import (
    AddedToken,
    ChatTemplate,
    TokenizerFiles,
    chat_template,
    frame,
    read_tokenizer_files,
)
from nestpatch.formats.gguf.header import Facts
from nestpatch.formats.gguf.vocabulary import ID_KEYS, PHI3, PREFIX, SPACE, SPECIALS, TEMPLATE, Kind

_BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
_CONTROL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
"""Control tokens, like those in _BRACKETS, that some tokenizers do not mark as special."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Everything under tokenizer.* in a GGUF file."""

    facts: Facts
    notes: tuple[str, ...]
    """How llama.cpp differs from the model's tokenizer."""


def read_vocabulary(folder: Path, rows: int, name: str) -> Vocabulary:
    """Reads the vocabulary of a model.

    Args:
        folder: The model's directory.
        rows: Rows of the embeddings: the size of the vocabulary in the file.
        name: The model's name, from which llama.cpp reads rules.

    Returns:
        The vocabulary.

    Raises:
        UnsupportedModelError: llama.cpp would tokenize differently.
        CheckpointFormatError: A file is missing or broken.
    """
    files = read_tokenizer_files(folder)
    byte_level = is_byte_level(files)
    table = _Table(rows)
    if byte_level:
        notes = byte_level_notes(files)
        pre = pre_tokenizer(files)
        tokens, merges = vocabulary(files)
        for text, number in tokens.items():
            table.put(number, text, Kind.NORMAL)
        facts: Facts = {}
    else:
        pre, merges = "default", []
        found, prefix, notes = pieces(files)
        for number, piece in found.items():
            text = piece.text.replace(SPACE, " ") if piece.kind is Kind.USER_DEFINED else piece.text
            table.put(number, text, piece.kind, piece.score)
        facts = {"add_space_prefix": prefix}
    for number, token in files.added.items():
        table.add(number, token)
    table.finish()
    if table.outside:
        notes += (f"{len(table.outside)} tokens of the tokenizer have no row in the embeddings and were left out",)
    facts |= _frame_facts(files, table, byte_level)
    facts |= {"model": "gpt2" if byte_level else "llama", "pre": pre, "tokens": table.texts, "token_type": table.kinds}
    facts |= {"merges": merges} if byte_level else {"scores": table.scores}
    full = {f"{PREFIX}{key}": value for key, value in facts.items()} | _template_facts(chat_template(files))
    return Vocabulary(full, notes + _name_notes(name, files, table))


def _template_facts(template: ChatTemplate | None) -> Facts:
    """The chat template; of several, the one named default."""
    if isinstance(template, str):
        return {TEMPLATE: template}
    named = {str(one.get("name")): str(one.get("template")) for one in template or ()}
    facts: Facts = {TEMPLATE: named.pop("default")} if "default" in named else {}
    if named:
        clean = {"".join(c if c.isascii() and c.isalnum() else "_" for c in key): text for key, text in named.items()}
        facts |= {f"{TEMPLATE}s": list(clean)}
        facts |= {f"{TEMPLATE}.{key}": text for key, text in clean.items()}
    return facts


class _Table:
    """Texts, kinds and scores by id, one for each row of the embeddings."""

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
        """Sets an added token, except one that is the unknown token already."""
        if 0 <= number < len(self.kinds) and self.kinds[number] == Kind.UNKNOWN:
            return
        text = token.content
        # llama.cpp finds control tokens in a text only where it is asked to parse them.
        if token.special or text in _CONTROL or any(text.startswith(a) and text.endswith(b) for a, b in _BRACKETS):
            self.put(number, text, Kind.CONTROL, -1000.0)
        else:
            # Added tokens are matched in the raw text, where a space is a space.
            self.put(number, text.replace(SPACE, " "), Kind.USER_DEFINED, -1000.0)

    def finish(self) -> None:
        """Names the unused ids. Raises CheckpointFormatError for a duplicate text, which llama.cpp does not load."""
        taken = set(self.texts)
        for number, text in enumerate(self.texts):
            if not text:
                pad = f"[PAD{number}]"
                self.texts[number] = pad if pad not in taken else f"[UNUSED_ROW_{number}]"
        self.ids = {text: number for number, text in enumerate(self.texts)}
        if len(self.ids) != len(self.texts):
            twice = [text for number, text in enumerate(self.texts) if self.ids[text] != number]
            raise CheckpointFormatError(f"{len(twice)} tokens have more than one id, among them {twice[0]!r}")


def _frame_facts(files: TokenizerFiles, table: _Table, byte_level: bool) -> Facts:
    """Ids of the special tokens, and whether the first and the last are added to every text."""
    facts: Facts = {}
    before, after = frame(files)
    for kind in SPECIALS:
        text, number = files.special(kind)
        if text is not None:
            number = table.ids.get(text)
        if number is not None and number < len(table.texts):
            facts[ID_KEYS[kind]] = number
    for kind, framed in (("bos", before), ("eos", after)):
        if framed is not None and framed in table.ids:
            facts[ID_KEYS[kind]] = table.ids[framed]
        stated = files.config.get(f"add_{kind}_token")
        # A sentencepiece model alone does not state it; tokenizers of that kind begin texts with BOS.
        assumed = framed is not None if files.tokenizer is not None else kind == "bos" and not byte_level
        facts[f"add_{kind}_token"] = bool(stated if isinstance(stated, bool) else assumed) and ID_KEYS[kind] in facts
    return facts


def _name_notes(name: str, files: TokenizerFiles, table: _Table) -> tuple[str, ...]:
    """Effects of the model's name: with "phi-3" in it llama.cpp strips white space after special tokens.

    Raises UnsupportedModelError where llama.cpp could not load a file of that name.
    """
    called = any(part in name.lower() for part in PHI3)
    missing = [text for text in ("</s>", "<unk>", "<s>", "<|endoftext|>") if text not in table.ids]
    if called and missing:
        raise UnsupportedModelError(
            f"llama.cpp requires the tokens of Phi-3 in every model with phi-3 in its name; {name} lacks {missing[0]}",
            advice="Give it another name inside the file: --name NAME",
        )
    strips = any(token.strips for token in files.added.values())
    if strips and not called:
        return ("some tokens strip white space beside them; llama.cpp does that only for models with phi-3 in their --name",)
    return ()
