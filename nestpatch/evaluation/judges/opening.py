"""From the name of a judge to the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches

from nestpatch.errors import DataError
from nestpatch.evaluation.judges.classifier import ClassifierJudge, require_labels
from nestpatch.evaluation.judges.endpoint import EndpointJudge, open_judge_endpoint
from nestpatch.evaluation.judges.guard import FAMILIES, GuardJudge, family_of
from nestpatch.evaluation.judges.keywords import KEYWORD_JUDGES
from nestpatch.evaluation.judges.protocol import Judge, Verdict

CLASSIFIER, ANSWER_CLASSIFIER, GUARD, ENDPOINT = "classifier", "answer-classifier", "guard", "endpoint"
MODEL_JUDGES = (CLASSIFIER, ANSWER_CLASSIFIER, GUARD, *FAMILIES)
"""Kinds of judges that are models, written KIND=MODEL."""


def require_judges(judges: Sequence[str | Judge], labels: Mapping[str, Verdict] | None = None) -> None:
    """Checks the names of judges without loading anything.

    Args:
        judges: As for `open_judges`.
        labels: As for `open_judges`.

    Raises:
        DataError: There is no judge, a name is not known or given twice, or labels are explained and no judge has any.
    """
    if not judges:
        raise DataError("no judge was given", advice="Name at least one, such as keywords.")
    names = [judge if isinstance(judge, str) else judge.name for judge in judges]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise DataError(f"the judge {twice[0]} was given twice")
    for judge in judges:
        if isinstance(judge, str) and not _is_known(judge):
            known = [*KEYWORD_JUDGES, *(f"{kind}=MODEL" for kind in MODEL_JUDGES), f"{ENDPOINT}=URL#MODEL"]
            kind, equals, _ = judge.partition("=")
            close = get_close_matches(f"{kind}=MODEL" if equals else kind, known, 1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise DataError(f"{judge!r} is not a judge", advice=f"{hint}The judges are {', '.join(known)}.")
    if labels and not any(name.partition("=")[0] in (CLASSIFIER, ANSWER_CLASSIFIER) for name in names):
        raise DataError("labels were explained, and no judge is a classifier", advice="Add --judge classifier=MODEL.")


def _is_known(name: str) -> bool:
    kind, _, source = name.partition("=")
    return name in KEYWORD_JUDGES or (kind in (*MODEL_JUDGES, ENDPOINT) and bool(source))


def parse_judge_labels(texts: Sequence[str]) -> dict[str, Verdict]:
    """Reads what the user says of the labels of classifiers.

    Args:
        texts: LABEL=VERDICT each.

    Returns:
        Label -> verdict.

    Raises:
        DataError: A text is something else.
    """
    labels = {}
    for text in texts:
        label, _, verdict = text.rpartition("=")
        if not label or verdict not in {one.value for one in Verdict}:
            raise DataError(
                f"{text!r} says nothing of a label", advice="Write LABEL=refused, LABEL=complied or LABEL=incoherent."
            )
        labels[label] = Verdict(verdict)
    return labels


def open_judges(
    judges: Sequence[str | Judge],
    *,
    labels: Mapping[str, Verdict] | None = None,
    device: str = "auto",
    stack: ExitStack | None = None,
) -> list[Judge]:
    """Loads judges.

    Args:
        judges: Names, or judges of your own. A name is that of a keyword list, KIND=MODEL, or endpoint=URL#MODEL.
        labels: What the labels of a classifier mean, where their names do not say it.
        device: Where models compute: "auto", "cpu", "cuda" or "mps".
        stack: Closes the connections of what was opened; None leaves them open.

    Returns:
        The judges, in the same order.

    Raises:
        DataError: A name is not known or given twice, or PyTorch cannot compute on the device.
        JudgeError: A model cannot be loaded, no classifier has a label of `labels`, or a server does not answer.
        MissingExtraError: A model needs packages that are not installed.
    """
    require_judges(judges, labels)
    found = []
    for judge in judges:
        one = _open(judge, labels or {}, device) if isinstance(judge, str) else judge
        if stack is not None and isinstance(judge, str) and isinstance(one, EndpointJudge):
            stack.enter_context(one)
        found.append(one)
    require_labels(labels or {}, [judge for judge in found if isinstance(judge, ClassifierJudge)])
    return found


def _open(name: str, labels: Mapping[str, Verdict], device: str) -> Judge:
    kind, _, source = name.partition("=")
    if kind in (CLASSIFIER, ANSWER_CLASSIFIER):
        return ClassifierJudge.load(name, source, device=device, given=labels, answer_only=kind == ANSWER_CLASSIFIER)
    if kind in KEYWORD_JUDGES:
        return KEYWORD_JUDGES[kind]
    if kind == ENDPOINT:
        return open_judge_endpoint(source)
    return GuardJudge.load(name, source, FAMILIES[family_of(source) if kind == GUARD else kind], device=device)
