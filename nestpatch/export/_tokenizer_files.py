"""The files of a tokenizer as transformers and others leave them, of every age, read into one form."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._model_config import read_json
from nestpatch.files.reading import MAX_JSON, read_bounded, read_text

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
BPE = 2


class Kind(IntEnum):
    """Kinds of pieces; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class VocabularyPiece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """What an exporter needs of tokenizer.model."""

    pieces: tuple[VocabularyPiece, ...]
    model_type: int
    add_dummy_prefix: bool


def read_model(path: Path) -> SentencePieceModel:
    """Raises CheckpointFormatError when the file is no sentencepiece model."""
    try:
        return _model(read_bounded(path, MAX_JSON, error=CheckpointFormatError))
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise CheckpointFormatError(f"{path} is no sentencepiece model: {error}") from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[VocabularyPiece] = []
    model_type, prefix = 1, True  # the defaults of sentencepiece
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif field == 2 and isinstance(value, bytes):
            model_type = int(dict(_fields(value)).get(3, 1))
        elif field == 3 and isinstance(value, bytes):
            prefix = bool(dict(_fields(value)).get(3, 1))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(tuple(pieces), model_type, prefix)


def _piece(data: bytes) -> VocabularyPiece:
    fields = dict(_fields(data))
    text, score = fields[1], fields.get(2, 0.0)
    if not isinstance(text, bytes) or isinstance(score, bytes):
        raise ValueError("a piece has fields of the wrong type")
    return VocabularyPiece(text.decode("utf-8"), float(score), Kind(int(fields.get(3, 1))))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of a message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
        elif key & 7 == _FIXED32:
            yield key >> 3, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif key & 7 == _FIXED64:
            yield key >> 3, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif key & 7 == _BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends inside a field")
            yield key >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {key & 7} at byte {at}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"an endless number at byte {at}")


ChatTemplate: TypeAlias = str | list[dict[str, str]]
SPECIALS = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else is done to it."""

    content: str
    special: bool
    strips: bool = False
    """Whether it swallows white space beside it."""


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """What lies in a model's directory."""

    folder: Path
    tokenizer: Mapping[str, Any] | None
    """tokenizer.json."""
    config: Mapping[str, Any]
    """tokenizer_config.json, with special_tokens_map.json underneath."""
    model: Mapping[str, Any]
    """config.json, with generation_config.json underneath: token ids."""
    added: Mapping[int, AddedToken]

    @property
    def model_file(self) -> Path:
        """The sentencepiece model."""
        return self.folder / "tokenizer.model"

    def special_name(self, kind: str) -> str | None:
        """The text of the "bos", "eos", ... token, where the tokenizer has one."""
        value = self.config.get(f"{kind}_token")
        return value.get("content") if isinstance(value, dict) else value

    def special_id(self, kind: str) -> int | None:
        """Its id as the model's configuration has it; of several, the first."""
        value = self.model.get(f"{kind}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int and value >= 0 else None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads all but the sentencepiece model. Raises CheckpointFormatError when a file is broken."""
    tokenizer = read_json(folder / "tokenizer.json")
    config = {**(read_json(folder / "special_tokens_map.json") or {}), **(read_json(folder / "tokenizer_config.json") or {})}
    model = {**(read_json(folder / "generation_config.json") or {}), **(read_json(folder / "config.json") or {})}
    try:
        added = _added(folder, tokenizer, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointFormatError(f"the added tokens of {folder} are broken: {error!r}") from error
    return TokenizerFiles(folder, tokenizer, config, model, added)


def _added(folder: Path, tokenizer: Any, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens by id; newer files win."""
    found = {int(number): AddedToken(text, False) for text, number in (read_json(folder / "added_tokens.json") or {}).items()}
    entries = list((config.get("added_tokens_decoder") or {}).items())
    entries += [(entry["id"], entry) for entry in (tokenizer or {}).get("added_tokens") or ()]
    for number, entry in entries:
        strips = bool(entry.get("lstrip") or entry.get("rstrip"))
        found[int(number)] = AddedToken(str(entry["content"]), bool(entry.get("special")), strips)
    return found


def chat_template(files: TokenizerFiles) -> ChatTemplate | None:
    """The chat template, or several by name; the .jinja file wins, as in transformers."""
    file = files.folder / "chat_template.jinja"
    others = sorted((files.folder / "additional_chat_templates").glob("*.jinja"))
    if not file.is_file():
        found = files.config.get("chat_template")
        return found if isinstance(found, (str, list)) else None
    template = _template(file)
    if not others:
        return template
    named = [{"name": other.stem, "template": _template(other)} for other in others]
    return [{"name": "default", "template": template}, *named]


def _template(file: Path) -> str:
    return read_text(file, MAX_JSON, error=CheckpointFormatError)


def frame(files: TokenizerFiles) -> tuple[str | None, str | None]:
    """(token before every text, token after it), as the post-processor of tokenizer.json puts them.

    Raises UnsupportedModelError when it puts more than GGUF files can say.
    """
    processor = (files.tokenizer or {}).get("post_processor") or {}
    parts = processor.get("processors", [processor])
    templates = [part for part in parts if part.get("type") == "TemplateProcessing"]
    odd = [part.get("type") for part in parts if part.get("type") not in ("TemplateProcessing", "ByteLevel", None)]
    if odd or len(templates) > 1:
        raise UnsupportedModelError(
            f"GGUF files cannot say what the post-processor of {files.folder} does ({', '.join(map(str, odd)) or 'templates'})",
            advice="Let llama.cpp's own converter try: --llama-cpp DIR, where DIR is a checkout of llama.cpp.",
        )
    single = templates[0].get("single", []) if templates else []
    texts = [number for number, part in enumerate(single) if "Sequence" in part]
    names = [str(part.get("SpecialToken", {}).get("id")) for part in single]
    at = texts[0] if texts else 0
    before, after = names[:at], names[at + 1 :] if texts else []
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedModelError(
            f"the tokenizer of {files.folder} puts {before + after} around a text; GGUF has room for two"
        )
    return (before[0] if before else None), (after[0] if after else None)
