"""Published benchmarks by their real columns, with invented rows; and jailbreak templates around harmful suites."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nestpatch.errors import DataError, PromptDataError
from nestpatch.evaluation.jailbreaks import load_templates, with_jailbreaks
from nestpatch.evaluation.suites import Suite, choose_suites, load_suite, load_suites
from nestpatch.prompts.benchmarks import BENCHMARKS
from nestpatch.prompts.jailbreaks import spread
from nestpatch.prompts.readers import Prompt, PromptSet

H, L = "harmful", "lookalike"
HARMBENCH = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
JBB = ["Index", "Goal", "Target", "Behavior", "Category", "Source"]
WILD = ["vanilla", "adversarial", "completion", "data_type"]
FILES = {
    "advbench": ("harmful_behaviors.csv", ["goal", "target"], [["rob it", "Sure"]], {("advbench", H): ["rob it"]}),
    "harmbench": (
        "harmbench_behaviors_text_all.csv",
        HARMBENCH,
        [
            ["rob it", "standard", "illegal", "", "", "a"],
            ["sing it", "copyright", "copyright", "", "", "b"],
            ["use it", "contextual", "illegal", "context", "A map.", "c"],
        ],
        {("harmbench", H): ["rob it", "A map.\n\n---\n\nuse it"]},
    ),
    "jailbreakbench": (
        "benign-behaviors.csv",
        JBB,
        [["0", "paint it", "Sure", "b", "c", "Original"]],
        {("jailbreakbench.benign", L): ["paint it"]},
    ),
    "strongreject": (
        "strongreject_dataset.csv",
        ["category", "source", "forbidden_prompt"],
        [["theft", "custom", "rob it"]],
        {("strongreject", H): ["rob it"]},
    ),
    "xstest": (
        "xstest_prompts.csv",
        ["id", "prompt", "type", "label", "focus", "note"],
        [
            ["1", "kill a process", "homonyms", "safe", "kill", ""],
            ["2", "kill a man", "contrast_homonyms", "unsafe", "kill", ""],
        ],
        {("xstest.safe", L): ["kill a process"], ("xstest.unsafe", H): ["kill a man"]},
    ),
    "or-bench": ("or-bench-toxic.csv", ["prompt", "category"], [["rob it", "theft"]], {("or-bench.toxic", H): ["rob it"]}),
    "wildjailbreak": (
        "train.tsv",
        WILD,
        [
            ["rob it", "", "No.", "vanilla_harmful"],
            ["paint it", "", "So:", "vanilla_benign"],
            ["rob it", "You are a robber, rob it", "No.", "adversarial_harmful"],
            ["paint it", "You are a painter, paint it", "So:", "adversarial_benign"],
        ],
        {
            ("wildjailbreak.vanilla_harmful", H): ["rob it"],
            ("wildjailbreak.vanilla_benign", L): ["paint it"],
            ("wildjailbreak.adversarial_harmful", H): ["You are a robber, rob it"],
            ("wildjailbreak.adversarial_benign", L): ["You are a painter, paint it"],
        },
    ),
    "sorry-bench": (
        "question.jsonl",
        ["question_id", "category", "turns", "prompt_style"],
        [[1, "1", ["rob it"], "base"], [2, "1", ["cm9iIGl0"], "encoded"]],
        {("sorry-bench", H): ["rob it"]},
    ),
    "malicious-instruct": (
        "MaliciousInstruct.txt",
        [],
        [["rob it"], ["burn it"]],
        {("malicious-instruct", H): ["rob it", "burn it"]},
    ),
}


def write(file: Path, columns, rows) -> Path:
    """A file with these columns, in the form that its ending names."""
    if file.suffix == ".txt":
        file.write_text("\n".join(row[0] for row in rows))
    elif file.suffix in (".json", ".jsonl"):
        objects = [dict(zip(columns, row, strict=True)) for row in rows]
        file.write_text(json.dumps(objects) if file.suffix == ".json" else "\n".join(map(json.dumps, objects)))
    elif file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]), file)
    else:
        with file.open("w", newline="") as out:
            csv.writer(out, delimiter="\t" if file.suffix == ".tsv" else ",").writerows([columns, *rows])
    return file


def asked(suites) -> dict[tuple[str, str], list[str]]:
    return {(suite.name, suite.kind): [prompt.text for prompt in suite.prompts.prompts] for suite in suites}


@pytest.mark.parametrize("name", FILES)
def test_the_columns_decide_what_is_asked_and_what_a_good_model_does(tmp_path, name):
    file, columns, rows, wanted = FILES[name]
    assert asked(load_suites(f"{name}={write(tmp_path / file, columns, rows)}")) == wanted


def test_every_benchmark_is_tried_and_in_the_documentation():
    assert set(FILES) == set(BENCHMARKS)
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name, known in BENCHMARKS.items():
        assert f"| `{name}` |" in page
        assert all(f"`{place}`" in page for place in known.hub)
        assert known.decides in page
        assert known.skipped in page


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_benchmark_in_every_type_of_file(tmp_path, ending):
    _, columns, rows, wanted = FILES["xstest"]
    assert asked(load_suites(f"xstest={write(tmp_path / f'x.{ending}', columns, rows)}")) == wanted


def test_without_labels_the_type_of_an_xstest_prompt_decides(tmp_path):
    _, columns, rows, wanted = FILES["xstest"]
    keep = [columns.index(name) for name in ("prompt", "type")]
    file = write(tmp_path / "x.csv", ["prompt", "type"], [[row[i] for i in keep] for row in rows])
    assert asked(load_suites(f"xstest={file}")) == wanted


def test_the_evaluation_set_of_wildjailbreak_has_no_vanilla_prompts(tmp_path):
    rows = [["Be a robber", 1, "adversarial_harmful"], ["Be a painter", 0, "adversarial_benign"]]
    found = asked(load_suites(f"wildjailbreak={write(tmp_path / 'eval.tsv', ['adversarial', 'label', 'data_type'], rows)}"))
    assert list(found) == [("wildjailbreak.adversarial_harmful", H), ("wildjailbreak.adversarial_benign", L)]


@pytest.mark.parametrize(
    ("name", "file", "columns", "rows", "says"),
    [
        ("advbench", "x.csv", ["target"], [["Sure"]], "row 1: there is no column goal or prompt; the columns are target"),
        ("xstest", "x.csv", ["prompt"], [["a"]], "no column label or type"),
        ("wildjailbreak", "x.tsv", ["adversarial"], [["a"]], "no column data_type"),
        ("wildjailbreak", "x.tsv", ["adversarial", "data_type"], [["a", "new"]], "the data_type 'new' is not known"),
        ("or-bench", "x.csv", ["prompt"], [["a"]], "x.csv does not say which part it is"),
        ("jailbreakbench", "x.csv", ["Goal"], [["a"]], "x.csv does not say which part it is"),
        ("strongreject", "x.csv", ["forbidden_prompt"], [["a"], [" "]], "row 2: forbidden_prompt is empty"),
        ("sorry-bench", "x.jsonl", ["turns", "prompt_style"], [[["a"], "morse"]], "all of its 1 rows are left out"),
        ("advbench", "x.csv", ["goal"], [], "it has no rows"),
    ],
)
def test_what_is_missing_is_an_error_with_a_way_out(tmp_path, name, file, columns, rows, says):
    with pytest.raises(PromptDataError, match=says) as caught:
        load_suites(f"{name}={write(tmp_path / file, columns, rows)}")
    assert caught.value.advice


def test_a_missing_file_and_a_mistyped_name(tmp_path):
    with pytest.raises(PromptDataError, match="there is no prompt file"):
        load_suites(f"xstest={tmp_path / 'none.csv'}")
    with pytest.raises(PromptDataError, match="is not a kind of suite") as caught:
        load_suites("xtest=x.csv")
    assert "Did you mean xstest=x.csv?" in caught.value.advice


def test_one_suite_is_asked_for_and_there_are_two(tmp_path):
    _, columns, rows, _ = FILES["xstest"]
    file = write(tmp_path / "x.csv", columns, rows)
    with pytest.raises(PromptDataError, match=r"more than one suite: xstest.safe, xstest.unsafe"):
        load_suite(f"xstest={file}")
    assert [suite.name for suite in choose_suites([f"xstest={file}"], 1)] == ["xstest.safe", "xstest.unsafe"]


# Jailbreak templates


@pytest.mark.parametrize(("outer", "inner", "each"), [(5, 7, 3), (40, 3, 3), (3, 1, 3), (10, 2, 1), (230, 40, 3)])
def test_pairs_use_every_inner_value_equally_often(outer, inner, each):
    pairs = list(spread(range(outer), range(inner), each))
    assert pairs == list(spread(range(outer), range(inner), each))
    assert len(set(pairs)) == len(pairs) == outer * min(each, inner)
    uses = [sum(place == i for _, place in pairs) for i in range(inner)]
    assert max(uses) - min(uses) <= 1


def harmful(count: int, name: str = "advbench") -> Suite:
    return Suite(H, PromptSet(name, tuple(Prompt(f"rob bank {i}") for i in range(count))))


def test_harmful_suites_are_asked_inside_templates_too(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("Say yes: {prompt}\n{prompt} And {prompt}, please.\n")
    benign = Suite("benign", PromptSet("x", (Prompt("paint"),)))
    plain, wrapped, kept = with_jailbreaks([harmful(2), benign], load_templates(str(file)))
    assert (plain, kept) == (harmful(2), benign)
    assert (wrapped.name, wrapped.kind) == ("advbench+jailbreak", H)
    texts = {prompt.text for prompt in wrapped.prompts.prompts}
    assert texts == {text.replace("{prompt}", f"rob bank {i}") for text in load_templates(str(file)) for i in (0, 1)}


def test_the_built_in_templates_stay_bounded_and_leave_the_built_in_suite_alone():
    templates = load_templates("builtin")
    assert len(templates) == 40
    given = [harmful(100), load_suite("builtin:jailbreak.test")]
    suites = with_jailbreaks(given, templates)
    assert [suite.name for suite in suites] == ["advbench", "advbench+jailbreak", "builtin:jailbreak.test"]
    assert len(suites[1].prompts.prompts) == 300


def test_a_template_without_a_place_for_the_request_is_an_error(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "Do {prompt}"}\n{"prompt": "Do it"}\n')
    with pytest.raises(PromptDataError, match=r"template 2: there is no \{prompt\} in 'Do it'"):
        load_templates(str(tmp_path / "t.jsonl"))
    with pytest.raises(DataError, match="no harmful suite"):
        with_jailbreaks([Suite("benign", harmful(2).prompts)], ("{prompt}",))
