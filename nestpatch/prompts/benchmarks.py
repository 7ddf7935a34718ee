"""Published safety benchmarks: their columns, and which of their rows a good model refuses.

None of them ships with nestpatch. They are read from a file that the user has, or from the Hub under the user's account.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import PromptDataError
from nestpatch.prompts.readers import Prompt, PromptSet, category_of, file_rows, hub_rows, is_file_name

Row: TypeAlias = Mapping[str, Any]
Part: TypeAlias = tuple[str, str]
"""Name of a part, "" for the whole benchmark, and its kind: "harmful" or "lookalike"."""
_HARMFUL: Part = ("", "harmful")
_TABS = {"delimiter": "\t", "keep_default_na": False}


@dataclass(frozen=True)
class Benchmark:
    """What is known of a published prompt set.

    Attributes:
        hub: Id of a data set on the Hub -> the (configuration, split) pairs of it that are read; the first id is the default.
        columns: The prompt is in the first of these that a row has. Names are compared without case.
        part: (row, place) -> the part that the row belongs to; None leaves it out. The place is the name of the file, or
            "configuration:split". Keys of the row are in lower case.
        licence: The licence of the prompts.
        decides: What decides the kind, for people.
        skipped: What is left out, for people.
        context: The columns that may hold a text that comes before the prompt.
        options: What `datasets.load_dataset` needs to read the files.
    """

    hub: Mapping[str, tuple[tuple[str | None, str], ...]]
    columns: tuple[str, ...]
    part: Callable[[Row, str], Part | None]
    licence: str
    decides: str = "all are harmful"
    skipped: str = ""
    context: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


def _all(_: Row, __: str) -> Part:
    return _HARMFUL


def _harmbench(row: Row, _: str) -> Part | None:
    return None if row.get("functionalcategory") == "copyright" else _HARMFUL


def _jailbreakbench(_: Row, place: str) -> Part:
    return _of_place(place, {"benign": ("benign", "lookalike"), "harmful": ("harmful", "harmful")})


def _xstest(row: Row, place: str) -> Part:
    label, kind = str(row.get("label") or "").lower(), str(row.get("type") or "")
    if label not in ("safe", "unsafe"):
        if not kind:
            raise _missing(place, ("label", "type"), row)
        label = "unsafe" if kind.startswith("contrast_") else "safe"
    return (label, "lookalike" if label == "safe" else "harmful")


def _or_bench(_: Row, place: str) -> Part:
    return _of_place(place, {"toxic": ("toxic", "harmful"), "hard": ("hard", "lookalike"), "80k": ("80k", "lookalike")})


def _wildjailbreak(row: Row, place: str) -> Part:
    if "data_type" not in row:
        raise _missing(place, ("data_type",), row)
    name = str(row["data_type"])
    if name not in _WILD:
        raise PromptDataError(f"{place}: the data_type {name[:60]!r} is not known", advice=f"Known are {', '.join(_WILD)}.")
    return (name, "harmful" if name.endswith("harmful") else "lookalike")


_WILD = ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign")


def _sorry_bench(row: Row, _: str) -> Part | None:
    return _HARMFUL if row.get("prompt_style", "base") == "base" else None


BENCHMARKS: Mapping[str, Benchmark] = {
    "advbench": Benchmark({"walledai/AdvBench": ((None, "train"),)}, ("goal", "prompt"), _all, "MIT"),
    "harmbench": Benchmark(
        {"walledai/HarmBench": (("standard", "train"), ("contextual", "train"))},
        ("behavior", "prompt"),
        _harmbench,
        "MIT",
        context=("contextstring", "context"),
        skipped="`FunctionalCategory` copyright: whether such a text is harmful depends on what the answer quotes",
    ),
    "jailbreakbench": Benchmark(
        {"JailbreakBench/JBB-Behaviors": (("behaviors", "harmful"), ("behaviors", "benign"))},
        ("goal", "prompt"),
        _jailbreakbench,
        "MIT",
        decides="the split, or harmful or benign in the file name",
    ),
    "strongreject": Benchmark({"walledai/StrongREJECT": ((None, "train"),)}, ("forbidden_prompt", "prompt"), _all, "MIT"),
    "xstest": Benchmark(
        {
            "Paul/XSTest": ((None, "train"),),
            "walledai/XSTest": ((None, "test"),),
            "natolambert/xstest-v2-copy": ((None, "prompts"),),
        },
        ("prompt",),
        _xstest,
        "CC BY 4.0",
        decides="`label`, or else a `type` that begins with contrast_, which is unsafe",
    ),
    "or-bench": Benchmark(
        {"bench-llm/or-bench": (("or-bench-hard-1k", "train"), ("or-bench-toxic", "train"))},
        ("prompt",),
        _or_bench,
        "CC BY 4.0",
        decides="the configuration, or toxic, hard or 80k in the file name: toxic is harmful",
        skipped="80k from the Hub; give or-bench-80k.csv to ask it",
    ),
    "wildjailbreak": Benchmark(
        {"allenai/wildjailbreak": (("eval", "train"),)},
        ("adversarial", "vanilla", "prompt"),
        _wildjailbreak,
        "ODC-BY",
        decides="`data_type`",
        skipped="the training configuration from the Hub; give train.tsv to ask it",
        options=_TABS,
    ),
    "sorry-bench": Benchmark(
        {"sorry-bench/sorry-bench-202503": ((None, "train"),), "sorry-bench/sorry-bench-202406": ((None, "train"),)},
        ("turns", "prompt"),
        _sorry_bench,
        "its own, no redistribution",
        skipped="a `prompt_style` other than base, which are translations and encodings of the same requests",
    ),
    "malicious-instruct": Benchmark({"walledai/MaliciousInstruct": ((None, "train"),)}, ("prompt",), _all, "none stated"),
}
"""Name for --suite -> what is known of it. docs/evaluation.md shows this table."""


def read_benchmark(name: str, source: str = "") -> list[tuple[str, PromptSet]]:
    """Reads a published benchmark.

    Args:
        name: One of BENCHMARKS.
        source: A file, or a data set of the Hub ("user/set", "user/set:split"); "" for the benchmark's own data set.

    Returns:
        (kind, prompts) of each part, in the order of the rows; a part is named "benchmark.part".

    Raises:
        PromptDataError: The source is missing, gated or empty, a column is missing, or the kind of a row is not known.
        MissingExtraError: The packages to read it are not installed.
    """
    known = BENCHMARKS[name]
    parts: dict[Part, dict[Prompt, None]] = {}
    count = 0
    for place, given in _places(known, source or next(iter(known.hub))):
        for given_row in given:
            row = _lower(given_row, place)
            count += 1
            prompt, part = _prompt(known, row, f"{place}, row {count}"), known.part(row, place)
            if part is not None:
                parts.setdefault(part, {})[prompt] = None
    if not parts:
        why = f"all of its {count} rows are left out ({known.skipped})" if count else "it has no rows"
        raise PromptDataError(f"{source or name} contains no prompts of {name}: {why}")
    return [(kind, PromptSet(f"{name}.{part}" if part else name, tuple(prompts))) for (part, kind), prompts in parts.items()]


def _places(known: Benchmark, source: str) -> list[tuple[str, list[Any]]]:
    """The rows of each file, or of each configuration and split, with the name of the place."""
    if is_file_name(source):
        return [(Path(source).name, file_rows(Path(source)))]
    name, _, split = source.partition(":")
    wanted = known.hub.get(name, ((None, split or "train"),))
    if split and name in known.hub:
        wanted = tuple(pair for pair in wanted if pair[1] == split) or ((wanted[0][0], split),)
    options = dict(known.options or {})
    return [(f"{config or name}:{part}", hub_rows(f"{name}:{part}", config, **options)) for config, part in wanted]


def _lower(row: Any, place: str) -> Row:
    """A row with keys in lower case; a line of text is its prompt."""
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping):
        raise PromptDataError(f"{place}: expected an object in each row, found {type(row).__name__}")
    return {str(key).lower(): value for key, value in row.items()}


def _prompt(known: Benchmark, row: Row, where: str) -> Prompt:
    """The prompt of a row, after its context where it has one."""
    named = [column for column in known.columns if column in row]
    if not named:
        raise _missing(where, known.columns, row)
    values = [value[0] if isinstance(value := row[column], list) and value else value for column in named]
    text = next((value for value in values if isinstance(value, str) and value.strip()), None)
    if text is None:
        raise PromptDataError(f"{where}: {' and '.join(named)} {'is' if len(named) == 1 else 'are'} empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptDataError(f"{where}: half a surrogate pair (\\ud800 to \\udfff), which is not a character")
    context = next((row[name] for name in known.context if isinstance(row.get(name), str) and row[name].strip()), None)
    # HarmBench puts the two together like this (its baseline DirectRequest).
    return Prompt(text if context is None else f"{context}\n\n---\n\n{text}", category=category_of(row))


def _of_place(place: str, parts: Mapping[str, Part]) -> Part:
    """The part whose key is in the name of the place."""
    found = next((part for key, part in parts.items() if key in place.lower()), None)
    if found is None:
        raise PromptDataError(
            f"the name {place} does not say which part it is", advice=f"Use a file name that contains {' or '.join(parts)}."
        )
    return found


def _missing(where: str, columns: tuple[str, ...], row: Row) -> PromptDataError:
    has = ", ".join(map(str, row)) or "none"
    return PromptDataError(
        f"{where}: there is no column {' or '.join(columns)}; the columns are {has}",
        advice="Give the file as it was published, or name the kind and use a file with a column prompt: --suite harmful=FILE.",
    )
