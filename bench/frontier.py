"""What `bench.tradeoff` measured, as tables and as a picture: `python -m bench.frontier FILE... [--picture docs/frontier.svg]`.

Every number is a mean over the seeds of a setting. The tables are Markdown, for bench/LOG.md and the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nestpatch.evaluation.suites import Share

Rows = list[dict[str, Any]]
NAMES = {"nest": "shared deltas (NeST)", "lora": "LoRA, r = 8"}


def read(files: Iterable[Path]) -> Rows:
    """All rows of the files."""
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def settings(rows: Rows) -> dict[tuple[Any, ...], Rows]:
    """(tag, method, prompts, strength) -> the rows of all seeds, in the order of the files."""
    groups: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        if row["method"] != "base":
            groups[row["tag"], row["method"], row["max_prompts"], row["strength"]].append(row)
    return groups


def mean(group: Rows, name: str) -> float:
    """Over the seeds."""
    return statistics.mean(row[name] for row in group)


def frontier_table(rows: Rows) -> str:
    """One row for each setting, with shares in per cent and rises in points, each with the largest of its sets."""
    heads = ("", "method", "prompts", "strength", "trained", "seeds")
    heads += ("attack success", "rise, benign", "rise, look-alike", "KL", "perplexity")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (tag, method, prompts, strength), group in settings(rows).items():
        sides = [
            f"{100 * mean(group, f'{name}_mean'):.1f} ({100 * mean(group, f'{name}_max'):.0f})"
            for name in ("attack", "rise_benign", "rise_lookalike")
        ]
        drift = f"{mean(group, 'kl'):.3f} | {100 * mean(group, 'perplexity_rise'):+.1f} %"
        cells = [tag, NAMES[method], prompts, strength, f"{group[0]['trained']:,}", len(group), *sides, drift]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def suite_table(rows: Rows, tag: str, method: str) -> str:
    """Refusals of every set at strength 1, before and after, with the 95 % interval of as many prompts as the set has."""
    base = next(row for row in rows if row["method"] == "base" and row["tag"] == tag)
    group = [row for row in rows if (row["tag"], row["method"], row.get("strength")) == (tag, method, 1.0)]
    lines = ["| refusals, % | prompts | base | patched | 95 % interval | single seeds |", "|---|---|---|---|---|---|"]
    for suite, before in base["suites"].items():
        counts = [row["suites"][suite]["count"] for row in group]
        total = before["total"]
        # The seeds were asked the same prompts: their answers do not make the interval narrower.
        low, high = Share(round(statistics.mean(counts)), total).interval
        seeds = ", ".join(f"{100 * count / total:.0f}" for count in counts)
        after = f"{100 * statistics.mean(counts) / total:.1f} | {100 * low:.0f}-{100 * high:.0f} | {seeds}"
        lines.append(f"| {suite} | {total} | {100 * before['value']:.1f} | {after} |")
    return "\n".join(lines)


def draw(rows: Rows, output: Path) -> None:
    """Attack success against the rise of refusals: a line over the strengths for every method and amount of data."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams |= {"svg.hashsalt": "nestpatch", "font.size": 11, "svg.fonttype": "none", "font.family": "sans-serif"}
    lines: dict[tuple[str, str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for (tag, method, prompts, strength), group in settings(rows).items():
        lines[tag, method, prompts].append((100 * mean(group, "rise_mean"), 100 * mean(group, "attack_mean"), strength))
    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    colours = {"nest": "#0a7d5a", "lora": "#b3541e"}
    amounts = sorted({prompts for _, _, prompts in lines})
    for (_, method, prompts), points in lines.items():
        shade = 0.35 + 0.65 * (amounts.index(prompts) + 1) / len(amounts)
        x, y, strengths = zip(*sorted(points, key=lambda point: point[2]), strict=True)
        label = f"{NAMES[method]}, {prompts:,} prompts of a kind"
        marker = "o" if method == "nest" else "s"
        axes.plot(x, y, marker=marker, markersize=5, color=colours[method], alpha=shade, label=label)
        if prompts == amounts[-1]:
            for place in zip(x, y, strengths, strict=True):
                axes.annotate(f"{place[2]:g}", place[:2], textcoords="offset points", xytext=(6, 4), fontsize=9)
    axes.set(xlabel="rise of refusals of harmless prompts, points", ylabel="attack success, %", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None, "Creator": None})


def main(words: Sequence[str] | None = None) -> None:
    """Prints the tables, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tag", default="", help="the settings of the table by set, and of the picture; others are ablations")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args(words)
    rows = read(given.files)
    print(frontier_table(rows))
    of_tag = [row for row in rows if row["tag"] == given.tag]
    for method in dict.fromkeys(row["method"] for row in of_tag if row["method"] != "base"):
        print(f"\n{NAMES[method]}, strength 1:\n\n{suite_table(of_tag, given.tag, method)}")
    if given.picture:
        draw(of_tag, given.picture)


if __name__ == "__main__":
    main()
