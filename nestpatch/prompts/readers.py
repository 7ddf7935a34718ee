"""Readers of prompt sets: files and data sets of the Hub to texts."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.errors import MissingExtraError, PromptDataError
from nestpatch.files.reading import open_regular, read_bounded, read_text
from nestpatch.prompts.builtin import PREFIX, builtin_rows

MAX_FILE = 256 << 20
"""Bytes of a prompt file at most: some million prompts."""
MAX_TABLE = 1 << 30
"""Bytes of the content of a Parquet file at most, unpacked."""
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_PROMPT_COLUMNS = ("prompt", "instruction", "question", "goal", "text")
_ANSWER_COLUMNS = ("reference", "answer", "response", "output", "target")
_CATEGORY_COLUMNS = ("category", "semanticcategory")
_LONGEST_CATEGORY = 80
"""Characters of a category at most."""
_DATA_SET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^/]+)?", re.ASCII)
"""What may name a data set of the Hub; anything else is a path, and no request is sent."""
_TIMEOUT = 10.0
"""Seconds in which the Hub must answer."""
_SLICE = re.compile(r"(.+)\[(-?\d{0,18}):(-?\d{0,18})\]", re.ASCII)


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        text: What is asked.
        reference: The right answer; None where none is known.
        category: What kind of request it is, such as a hazard; None where its source names none. Not what is asked:
            prompts that differ in it alone are equal.
    """

    text: str
    reference: str | None = None
    category: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PromptSet:
    """Prompts from one source.

    Attributes:
        name: The file's name without its ending, or the data set's id.
        prompts: Without duplicates.
    """

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts as canonical JSON, hex: the same whatever the file type."""
        rows = [[p.text, p.reference] for p in self.prompts]
        return sha256(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Returns what a pack records of this set: "name", "prompts" (their number) and "sha256"."""
        return {"name": self.name, "prompts": len(self.prompts), "sha256": self.digest}


def load_prompts(source: str | Path) -> PromptSet:
    """Reads prompts from a file or a data set, without duplicates.

    The prompt is in the column "prompt", or else "instruction", "question", "goal" or "text"; the right answer, where there is
    one, in "reference", "answer", "response", "output" or "target", and its category in "category".

    Args:
        source: A .jsonl, .json, .csv, .tsv, .parquet or .txt file, a built-in set ("builtin:harmful.test"), or a data set of
            the Hub ("user/set", "user/set:split"). "SOURCE[100:200]" takes a slice of the rows, as in Python.

    Returns:
        The prompts.

    Raises:
        PromptDataError: The source is missing, empty or malformed.
        MissingExtraError: The packages to read it are not installed.
    """
    slicing = _SLICE.fullmatch(str(source))
    place = slicing[1] if slicing else str(source)
    start, stop = (int(slicing[part]) if slicing and slicing[part] else None for part in (2, 3))
    path = Path(place)
    if place.startswith(PREFIX):
        rows: list[Any] = list(builtin_rows(place.removeprefix(PREFIX)))
    else:
        rows = file_rows(path) if is_file_name(place) else hub_rows(place)
    prompts = tuple(dict.fromkeys(_prompt(row, source, number) for number, row in enumerate(rows[start:stop], start=1)))
    if not prompts:
        raise PromptDataError(f"{source} contains no prompts")
    name = path.stem if path.suffix in _ENDINGS else place
    return PromptSet(name + (f"[{slicing[2]}:{slicing[3]}]" if slicing else ""), prompts)


def join_sets(sets: Sequence[PromptSet]) -> PromptSet:
    """Joins sets into one, without duplicates.

    Args:
        sets: At least one.

    Returns:
        The set, with all names joined by "+".
    """
    if len(sets) == 1:
        return sets[0]
    prompts = dict.fromkeys(prompt for each in sets for prompt in each.prompts)
    return PromptSet("+".join(each.name for each in sets), tuple(prompts))


def sample_set(prompts: PromptSet, limit: int, seed: int) -> PromptSet:
    """Draws from a set.

    Args:
        prompts: What to draw from.
        limit: How many prompts at most.
        seed: Decides which.

    Returns:
        The chosen prompts, in their old order.
    """
    if len(prompts.prompts) <= limit:
        return prompts
    kept = sorted(random.Random(f"sample {seed}").sample(range(len(prompts.prompts)), limit))
    return PromptSet(prompts.name, tuple(prompts.prompts[i] for i in kept))


def is_file_name(place: str) -> bool:
    """Decides whether a text names a prompt file, or else a data set of the Hub.

    Args:
        place: Without a slice.

    Returns:
        True for a name with the ending of a prompt file.

    Raises:
        PromptDataError: It is neither.
    """
    if Path(place).suffix in _ENDINGS:
        return True
    if os.path.exists(place):  # noqa: PTH110 - answers no where Path.exists raises
        raise PromptDataError(f"{place} is not a prompt file: expected a name that ends in {', '.join(_ENDINGS)}")
    if _DATA_SET.fullmatch(place) is None:
        raise PromptDataError(f"there is no prompt file {place}")
    return False


def file_rows(path: Path) -> list[Any]:
    """Reads the rows of a prompt file.

    Args:
        path: Its ending decides how it is read.

    Returns:
        One mapping for each row; one text for each line of a .txt file.

    Raises:
        PromptDataError: The file is missing or malformed.
        MissingExtraError: The package that reads Parquet is not installed.
    """
    try:
        return list(_rows(path))
    except FileNotFoundError as error:
        raise PromptDataError(f"there is no prompt file {path}") from error
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptDataError(f"cannot read {path}: {reason}") from error


def _rows(path: Path) -> Iterator[Any]:
    """The rows of a file, by its ending."""
    if path.suffix == ".json":
        yield from _json(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        text, between = read_bounded(path, MAX_FILE).decode("utf-8"), "\t" if path.suffix == ".tsv" else ","
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    else:
        for number, line in enumerate(read_text(path, MAX_FILE).splitlines(), start=1):
            if line.strip():
                try:
                    yield json.loads(line) if path.suffix == ".jsonl" else line
                except (ValueError, RecursionError) as error:
                    raise PromptDataError(f"{path}, line {number}: {error}") from None


def _json(path: Path) -> Iterator[Any]:
    data = json.loads(read_text(path, MAX_FILE))
    if isinstance(data, dict):
        # Some public sets are one object of parallel lists.
        lists = {name: value for name, value in data.items() if isinstance(value, list)}
        named = next((lists[f"{name}s"] for name in _PROMPT_COLUMNS if f"{name}s" in lists), None)
        data = named or (next(iter(lists.values())) if len(lists) == 1 else data)
    if not isinstance(data, list):
        raise PromptDataError(f"{path}: expected a list of prompts, found {type(data).__name__}")
    yield from data


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("train", "reading Parquet") from error
    with open_regular(path) as file:
        table = parquet.ParquetFile(file)
        groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
        if (size := sum(group.total_byte_size for group in groups)) > MAX_TABLE:
            raise PromptDataError(f"{path} unpacks to {size} bytes; {MAX_TABLE} are allowed")
        yield from table.read().to_pylist()


def hub_rows(source: str, config: str | None = None, **options: Any) -> list[Any]:
    """Reads a data set of the Hub, or of its cache.

    Args:
        source: "user/set", or "user/set:split"; the split is "train" unless named.
        config: The configuration of a set that has several.
        options: Passed on to `datasets.load_dataset`.

    Returns:
        One mapping for each row.

    Raises:
        PromptDataError: There is no such data set, it is gated, or it cannot be read.
        MissingExtraError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("train", "reading a data set of the Hub") from error
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    name, _, split = source.partition(":")
    try:
        # Without the Hub, `datasets` retries for half a minute, with a warning for each attempt, and then fails.
        cached = constants.HF_HUB_OFFLINE or try_to_load_from_cache(name, "README.md", repo_type="dataset") is not None
        if not cached:
            HfApi().dataset_info(name, timeout=_TIMEOUT)
        return list(datasets.load_dataset(name, config, split=split or "train", **options))
    except Exception as error:  # `datasets` raises network, parsing and script errors of many kinds
        if "gated" in str(error).lower():
            page = f"{constants.ENDPOINT}/datasets/{name}"
            advice = f"Accept its terms on {page} and log in with `hf auth login`, or download the file and give its path."
            raise PromptDataError(f"the data set {name} is gated, and this account may not read it", advice=advice) from error
        raise PromptDataError(f"there is no prompt file {source}, and the Hub gave no data set: {error}") from error


def _prompt(row: Any, source: str | Path, number: int) -> Prompt:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise PromptDataError(f"{source}, row {number}: expected an object, found {type(row).__name__}")
    column = next((name for name in _PROMPT_COLUMNS if name in row), None)
    if column is None:
        raise PromptDataError(
            f"{source}, row {number}: no column {' or '.join(_PROMPT_COLUMNS)}; it has {', '.join(map(str, row))}"
        )
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise PromptDataError(f"{source}, row {number}: {column} is {'empty' if text in ('', None) else repr(text)[:60]}")
    if any("\ud800" <= character <= "\udfff" for value in row.values() if isinstance(value, str) for character in value):
        raise PromptDataError(f"{source}, row {number}: half a surrogate pair (\\ud800 to \\udfff), which is not a character")
    extra = row.get("input")
    if isinstance(extra, str) and extra.strip():  # Alpaca keeps the material of a task in a column of its own
        text = f"{text}\n\n{extra}"
    reference = next((row[name] for name in _ANSWER_COLUMNS if isinstance(row.get(name), str) and row[name].strip()), None)
    return Prompt(text, reference, category_of(row))


def category_of(row: Mapping[Any, Any]) -> str | None:
    """Reads the category of a prompt.

    Args:
        row: A row of a prompt set.

    Returns:
        What is in the column "category", or in HarmBench "semanticcategory"; None where that is no short text.
    """
    found = next((row[name] for name in _CATEGORY_COLUMNS if isinstance(row.get(name), str) and row[name].strip()), "").strip()
    usable = 0 < len(found) <= _LONGEST_CATEGORY and not any("\ud800" <= character <= "\udfff" for character in found)
    return found if usable else None
