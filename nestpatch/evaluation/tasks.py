"""Tasks of EleutherAI's lm-eval, such as gsm8k, on a model that transformers has loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nestpatch.errors import DataError, EvaluationTaskError, MissingExtraError
from nestpatch.files.reading import MAX_JSON, read_text
from nestpatch.runtimes.protocol import runtime_of
from nestpatch.runtimes.transformers import TransformersRuntime

_BATCH = 8
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task.

    Attributes:
        task: Its name.
        metric: As lm-eval names it, with its filter: "exact_match,strict-match".
        value: The mean over the samples.
        error: Its standard error; None where lm-eval has none.
        samples: How many questions were asked.
        higher_is_better: What lm-eval says of the metric; None where it says nothing.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int
    higher_is_better: bool | None

    def as_json(self) -> dict[str, Any]:
        """The metric without the name of its task."""
        error = None if self.error is None else round(self.error, 6)
        facts = {"metric": self.metric, "value": round(self.value, 6), "standard_error": error, "samples": self.samples}
        return facts | {"higher_is_better": self.higher_is_better}


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows.

    Attributes:
        names: Of the tasks or groups of tasks.
        manager: lm-eval's index of all tasks.
        limit: Questions of each task at most; None for all.
    """

    names: tuple[str, ...]
    manager: Any
    limit: int | None = None


def find_tasks(texts: Sequence[str], model: str | Path, limit: int | None = None) -> Tasks | None:
    """Finds tasks before anything is loaded.

    Args:
        texts: Names of tasks or groups of lm-eval, or .yaml files that define a task.
        model: The model to evaluate.
        limit: Questions of each task at most: the first ones.

    Returns:
        The tasks; None without any.

    Raises:
        DataError: A task is not known, or the model is one that transformers does not run.
        MissingExtraError: lm-eval is not installed.
    """
    if not texts:
        return None
    if runtime_of(model) != "transformers":
        raise DataError(
            f"tasks of lm-eval run in transformers, and {model} does not",
            advice="Evaluate the directory that the file was made from, or leave out --task.",
        )
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "running tasks of lm-eval") from error
    files = {text: Path(text) for text in texts if Path(text).suffix in _YAML}
    names = tuple(_name(files[text]) if text in files else text for text in texts)
    folders = [str(file.resolve().parent) for file in files.values()]
    # lm-eval's own tasks are thousands of files, which take most of a minute to read.
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(texts))
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, 1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise DataError(f"lm-eval has no task {name[:60]!r}", advice=f"{hint}`lm_eval ls tasks` lists them.")
    return Tasks(names, manager, limit)


def _name(file: Path) -> str:
    """The name of the task that a file defines."""
    try:
        found = re.search(r"^task:\s*[\"']?([\w.-]+)", read_text(file, MAX_JSON), re.MULTILINE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the task {file}: {reason}", advice="Check the path.") from error
    if found is None:
        raise DataError(f"{file} does not define a task", advice="A task of lm-eval has a line `task: NAME`.")
    return found[1]


def run_tasks(model: TransformersRuntime, tasks: Tasks) -> tuple[TaskScore, ...]:
    """Runs tasks as lm-eval does without options: its own few-shot examples, no chat template, greedy where a task generates.

    Args:
        model: What answers.
        tasks: From `find_tasks`.

    Returns:
        Every metric of every task, in the order of the names.

    Raises:
        EvaluationTaskError: A data set cannot be read, or a task fails.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=_BATCH)
    try:
        with model.active():
            found = lm_eval.simple_evaluate(
                wrapped, tasks=list(tasks.names), task_manager=tasks.manager, limit=tasks.limit, log_samples=False
            )
    except Exception as error:  # tasks are code and data from anywhere
        reason = str(error).strip().partition("\n")[0]
        raise EvaluationTaskError(f"lm-eval cannot run {', '.join(tasks.names)}: {reason or type(error).__name__}") from error
    return tuple(score for name, result in found["results"].items() for score in _scores(name, result, found))


def _scores(name: str, result: Mapping[str, Any], found: Mapping[str, Any]) -> list[TaskScore]:
    """The metrics of one task: "metric,filter" -> number, each with its "metric_stderr,filter"."""
    samples = int(found.get("n-samples", {}).get(name, {}).get("effective", 0))
    better = found.get("higher_is_better", {}).get(name, {})
    scores = []
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = result.get(f"{metric}_stderr,{kind}")
            error = float(error) if isinstance(error, (int, float)) else None
            scores.append(TaskScore(name, key, float(value), error, samples, better.get(metric)))
    return scores


def largest_fall(before: Sequence[TaskScore], after: Sequence[TaskScore]) -> float | None:
    """How much worse a model has become at worst.

    Args:
        before: Of the base.
        after: Of the patched model, of the same tasks.

    Returns:
        The largest fall of a metric of which more is better, 0 where none fell; NaN, which keeps no limit, where one is
        not a number; None where there is no such metric.
    """
    old = {(score.task, score.metric): score.value for score in before if score.higher_is_better}
    falls = [old[key] - score.value for score in after if (key := (score.task, score.metric)) in old]
    if any(math.isnan(fall) for fall in falls):  # which max would pass over
        return math.nan
    return max(0.0, *falls) if falls else None
