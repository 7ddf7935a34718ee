"""The files of a tokenizer, as any version of transformers or sentencepiece writes them, read into one form."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._model_config import OTHER_CONVERTER, read_json
from nestpatch.files.reading import MAX_JSON, read_bounded, read_text

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""
BPE = 2
"""The model type of a sentencepiece BPE."""
ChatTemplate: TypeAlias = str | list[dict[str, str]]
SPECIALS = ("bos", "eos", "unk", "sep", "pad", "mask")


class Kind(IntEnum):
    """Kinds of pieces, with the numbers that sentencepiece and GGUF share."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class VocabularyPiece:
    """One entry of a sentencepiece vocabulary; its position in the list is its id."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields of tokenizer.model that an exporter needs."""

    pieces: tuple[VocabularyPiece, ...]
    model_type: int
    add_dummy_prefix: bool


def read_model(path: Path) -> SentencePieceModel:
    """Reads tokenizer.model. Raises CheckpointFormatError when the file is no sentencepiece model."""
    try:
        return _model(read_bounded(path, MAX_JSON, error=CheckpointFormatError))
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise CheckpointFormatError(f"{path} is no sentencepiece model: {error}") from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[VocabularyPiece] = []
    model_type, prefix = 1, True  # the defaults of sentencepiece
    for field, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            piece = dict(_fields(value))
            text, score = piece[1], piece.get(2, 0.0)
            if not isinstance(text, bytes) or isinstance(score, bytes):
                raise ValueError("a piece has fields of the wrong type")
            pieces.append(VocabularyPiece(text.decode("utf-8"), float(score), Kind(int(piece.get(3, 1)))))
        elif field == 2:
            model_type = int(dict(_fields(value)).get(3, 1))
        elif field == 3:
            prefix = bool(dict(_fields(value)).get(3, 1))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(tuple(pieces), model_type, prefix)


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field of a message, in order."""
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
    """(number, position after it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number without end at byte {at}")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the raw text, before it is split."""

    content: str
    special: bool
    strips: bool = False
    """Whether white space beside it is stripped."""


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """The content of the tokenizer's files in a model's directory."""

    folder: Path
    tokenizer: Mapping[str, Any] | None
    """tokenizer.json."""
    config: Mapping[str, Any]
    """tokenizer_config.json; missing fields are those of special_tokens_map.json."""
    model: Mapping[str, Any]
    """config.json; missing fields, such as token ids, are those of generation_config.json."""
    added: Mapping[int, AddedToken]

    def special(self, kind: str) -> tuple[str | None, int | None]:
        """(text, id) of the "bos", "eos", ... token, as the configuration files have it; of several ids the first."""
        text, number = self.config.get(f"{kind}_token"), self.model.get(f"{kind}_token_id")
        text = text.get("content") if isinstance(text, dict) else text
        number = number[0] if isinstance(number, list) and number else number
        return text, number if type(number) is int and number >= 0 else None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads all files but the sentencepiece model. Raises CheckpointFormatError when one is broken."""
    tokenizer = read_json(folder / "tokenizer.json")
    config = {**(read_json(folder / "special_tokens_map.json") or {}), **(read_json(folder / "tokenizer_config.json") or {})}
    model = {**(read_json(folder / "generation_config.json") or {}), **(read_json(folder / "config.json") or {})}
    try:
        added = _added(folder, tokenizer, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointFormatError(f"the added tokens of {folder} are broken: {error!r}") from error
    return TokenizerFiles(folder, tokenizer, config, model, added)


def _added(folder: Path, tokenizer: Any, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens by id; newer kinds of files take precedence."""
    found = {int(number): AddedToken(text, False) for text, number in (read_json(folder / "added_tokens.json") or {}).items()}
    entries = list((config.get("added_tokens_decoder") or {}).items())
    entries += [(entry["id"], entry) for entry in (tokenizer or {}).get("added_tokens") or ()]
    for number, entry in entries:
        strips = bool(entry.get("lstrip") or entry.get("rstrip"))
        found[int(number)] = AddedToken(str(entry["content"]), bool(entry.get("special")), strips)
    return found


def chat_template(files: TokenizerFiles) -> ChatTemplate | None:
    """The chat template, or several by name. As in transformers, a .jinja file takes precedence."""
    main = files.folder / "chat_template.jinja"
    if not main.is_file():
        found = files.config.get("chat_template")
        return found if isinstance(found, (str, list)) else None
    others = sorted((files.folder / "additional_chat_templates").glob("*.jinja"))
    texts = [read_text(file, MAX_JSON, error=CheckpointFormatError) for file in (main, *others)]
    names = ["default", *(other.stem for other in others)]
    return [{"name": name, "template": text} for name, text in zip(names, texts, strict=True)] if others else texts[0]


def frame(files: TokenizerFiles) -> tuple[str | None, str | None]:
    """(token before every text, token after it), from the post-processor of tokenizer.json.

    Raises UnsupportedModelError when it adds more than a GGUF file can express.
    """
    processor = (files.tokenizer or {}).get("post_processor") or {}
    parts = processor.get("processors", [processor])
    templates = [part for part in parts if part.get("type") == "TemplateProcessing"]
    odd = [part.get("type") for part in parts if part.get("type") not in ("TemplateProcessing", "ByteLevel", None)]
    if odd or len(templates) > 1:
        raise UnsupportedModelError(
            f"a GGUF file cannot express the post-processor of {files.folder} ({', '.join(map(str, odd)) or 'templates'})",
            advice=OTHER_CONVERTER,
        )
    single = templates[0].get("single", []) if templates else []
    texts = [number for number, part in enumerate(single) if "Sequence" in part]
    names = [str(part.get("SpecialToken", {}).get("id")) for part in single]
    at = texts[0] if texts else 0
    before, after = names[:at], names[at + 1 :] if texts else []
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedModelError(
            f"the tokenizer of {files.folder} puts {before + after} around a text; a GGUF file can have one token on each side"
        )
    return (before[0] if before else None), (after[0] if after else None)
