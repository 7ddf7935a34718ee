"""The text of an answer while its tokens come: pieces that join to the text of all tokens, and never end inside a character."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What stands for the bytes of a character whose other tokens are missing yet."""
_LAST_WORD = re.compile(r"\s*\S*\Z")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def pieces(
    tokens: Iterable[int],
    decode: Callable[[Sequence[int]], str],
    *,
    partial: Callable[[int], bool] = lambda _: False,
    by_word: bool = False,
) -> Iterator[str]:
    """Turns tokens into text as they come. Joined, the pieces are `decode(all tokens).strip()`.

    All tokens are decoded again for each of them, because what a token adds depends on those before it.

    Args:
        tokens: The tokens of an answer.
        decode: Token ids to text.
        partial: Whether a token is a byte whose text depends on the tokens after it.
        by_word: Whether `decode` may change the last word and the space before it when another token follows.

    Yields:
        Text that no later token changes; none of it is empty.
    """
    ids: list[int] = []
    done = text = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids).lstrip()
        # A character whose last bytes are missing, and spaces, which end no answer, wait for the next token.
        whole = text.rstrip(_UNFINISHED).rstrip()
        if by_word:
            whole = _LAST_WORD.sub("", whole)
        if len(whole) > len(done) and whole.startswith(done) and not partial(token):
            yield whole[len(done) :]
            done = whole
    if rest := text.rstrip()[len(done) :]:
        yield rest


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Turns tokens into text as they come, with a tokenizer of transformers.

    Args:
        tokenizer: Of the model.
        tokens: The tokens of an answer; special ones have no text.

    Yields:
        As `pieces`.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def partial(token: int) -> bool:
        # Vocabularies of SentencePiece: one wrong byte turns its neighbours into replacement characters, too.
        return _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))) is not None

    cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    return pieces(tokens, decode, partial=partial, by_word=cleans_up)
