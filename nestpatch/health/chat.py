"""Whether a chat template or generation settings take refusals away: by themselves, and compared with those of the base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.health.checks import Check, Health
from nestpatch.runtimes.chat_form import ANSWER, PROMPT, STEERING, ChatForm

_TAG = re.compile(r"<[^<>]{0,80}>|\[/?[A-Z_]{2,20}\]")
"""Special tokens as models write them: <|im_start|>, <start_of_turn>, <think>, [/INST]."""
_HEADER_WORDS = 3
"""Words that the beginning of an answer may have outside of special tokens, such as "### Response:"."""
_OVERRIDES = re.compile(
    r"\b(?:never|don'?t|do not|must not|cannot|can't|may not|without)\s+(?:ever\s+)?(?:refus|declin|reject|warn|morali[sz])\w*"
    r"|\bno\s+(?:restrictions?|limits?|limitations|filters?|ethic\w*|moral\w*|refusals?)\b"
    r"|\b(?:unrestricted|uncensored|unfiltered|jailbr\w+)\b"
    r"|\balways\s+(?:comply|obey|agree)\b"
    r"|\bignor\w+\s+(?:all|any|your|previous|prior)\b",
    re.IGNORECASE,
)
"""What instructions say that take refusals away."""
_RESTORE = "Put the base's chat template back, or measure what is left of the refusals: nestpatch doctor --measure"


def template_check(form: ChatForm | None, known: Mapping[str, Any] | None, source: str) -> Check:
    """Judges the chat template.

    Args:
        form: Of the model; None where its files cannot be read.
        known: `ChatForm.facts` of the base; None where neither a pack nor a base tells.
        source: Whose facts these are, for the message.

    Returns:
        The check.
    """
    if form is None or form.template is None:
        what = "its files have no chat template"
        if known and known.get("prompt"):
            return Check(
                "template", Health.FAILED, f"{what}, and {source} has one: prompts reach the model in another form", _RESTORE
            )
        return Check("template", Health.NOT_CHECKED, what)
    try:
        if problem := _own_problem(form):
            return Check("template", Health.FAILED, problem, _RESTORE)
        return _compared(form, known, source)
    except MissingExtraError as error:
        return Check("template", Health.NOT_CHECKED, str(error), error.advice)
    except CheckpointFormatError as error:
        return Check("template", Health.FAILED, str(error), _RESTORE)


def _own_problem(form: ChatForm) -> str:
    """What in the template itself takes refusals away; empty where nothing is found."""
    head, _, tail = form.prompt.partition(PROMPT)
    if prefix := _answer_prefix(form, tail):
        return f"the chat template begins every answer with {_quoted(prefix)}: an answer that has begun is rarely refused"
    if not tail and PROMPT not in form.prompt:
        return "the chat template does not write the user's prompt"
    for text in (head, tail):
        if found := _OVERRIDES.search(_TAG.sub(" ", text)):
            return f"the chat template adds an instruction that overrides refusals: {_quoted(_around(text, found[0]))}"
    return ""


def _answer_prefix(form: ChatForm, tail: str) -> str:
    """Words that the template puts at the beginning of the answer that the model is to write.

    What it writes before an answer that is given is the header of an answer; anything after that header, other than special
    tokens, is a beginning of the answer itself. A beginning that is written before both is recognised by its length.
    """
    user = {"role": "user", "content": PROMPT}
    try:
        whole = form.render([user, {"role": "assistant", "content": ANSWER}], answer=False)
    except CheckpointFormatError:  # some templates render no finished conversation
        whole = ""
    header = whole.partition(PROMPT)[2].partition(ANSWER)[0] if ANSWER in whole else ""
    extra = tail[len(header) :] if header and tail.startswith(header) else ""
    words = _words(extra)
    if words:
        return " ".join(words)
    last = _TAG.split(header or tail)[-1].strip()
    last = last.rpartition("\n")[2]
    return last if len(_words(last)) > _HEADER_WORDS else ""


def _compared(form: ChatForm, known: Mapping[str, Any] | None, source: str) -> Check:
    expected = known.get("prompt") if known else None
    clean = "it begins no answers and adds no instruction against refusals"
    if not isinstance(expected, str):
        return Check(
            "template",
            Health.NOT_CHECKED,
            f"{clean}; whether it is the base's is not known: no pack here records that",
            "Give the base to compare with: --base MODEL",
        )
    if expected == form.prompt:
        eos, ours = (known or {}).get("eos_token"), form.tokens.get("eos_token")
        if eos and ours and eos != ours:
            detail = f"answers end with {_quoted(ours)} instead of {_quoted(str(eos))}, the end token of {source}"
            return Check("template", Health.WARNING, detail, _RESTORE)
        return Check("template", Health.OK, f"prompts have the form that {source} has; {clean}")
    detail = f"prompts have another form than {source} has: {_first_difference(form.prompt, expected)}"
    return Check("template", Health.FAILED, detail, _RESTORE)


def generation_check(form: ChatForm | None, known: Mapping[str, Any] | None, source: str) -> Check:
    """Judges generation_config.json.

    Args:
        form: Of the model; None where its files cannot be read.
        known: `ChatForm.facts` of the base; None where neither a pack nor a base tells.
        source: Whose facts these are, for the message.

    Returns:
        The check.
    """
    if form is None or form.generation is None:
        return Check("generation", Health.NOT_CHECKED, "files of this format hold no generation settings; the server sets them")
    expected = known.get("generation") if known else None
    base = expected if isinstance(expected, Mapping) else None
    changed = [
        name for name in STEERING if form.generation.get(name) and (base is None or base.get(name) != form.generation[name])
    ]
    advice = "Put the base's generation_config.json back."
    if changed:
        detail = (
            f"generation_config.json forbids or forces tokens ({', '.join(changed)}), which can keep a refusal from beginning"
        )
        return Check("generation", Health.WARNING if base is None else Health.FAILED, detail, advice)
    if base is None:
        return Check("generation", Health.OK, "generation_config.json forbids and forces no tokens")
    names = sorted(name for name in form.generation.keys() | base.keys() if form.generation.get(name) != base.get(name))
    if names:
        shown = ", ".join(f"{name} {_value(form.generation.get(name))} instead of {_value(base.get(name))}" for name in names)
        return Check("generation", Health.WARNING, f"answers are drawn otherwise than {source} says: {shown}", advice)
    return Check("generation", Health.OK, f"generation_config.json has the settings that {source} has")


def _words(text: str) -> list[str]:
    return re.findall(r"\w[\w',.!-]*", _TAG.sub(" ", text))


def _around(text: str, found: str) -> str:
    """The sentence with a phrase."""
    plain = _TAG.sub(" ", text)
    start = plain.find(found)
    begin = max(plain.rfind(mark, 0, start) for mark in ".\n!") + 1
    ends = [end for mark in ".\n!" if (end := plain.find(mark, start + len(found))) >= 0]
    return plain[begin : min(ends, default=len(plain))]


def _first_difference(ours: str, theirs: str) -> str:
    pairs = zip(ours, theirs, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    start = max(0, same - 20)
    return f"{_quoted(ours[start : same + 60])} instead of {_quoted(theirs[start : same + 60])}"


def _quoted(text: str) -> str:
    """A text for a message, on one line and short."""
    line = json.dumps(" ".join(text.split()) if "\n" not in text.strip() else text, ensure_ascii=False)
    return line if len(line) <= 120 else f'{line[:116]}.."'


def _value(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)[:40]
