"""What `bench.efficacy` measured, as tables and as a picture: `python -m bench.frontier FILE... [--picture docs/frontier.svg]`.

Every number is a mean over the seeds of a setting. Intervals are 95 % Wilson intervals of as many prompts as were asked: the
seeds were asked the same prompts, so they do not make an interval narrower. The p-values compare a method with nest of the same
tag, data, strength and seeds, on the same prompts; they are not corrected for many comparisons. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from nestpatch.evaluation.shares import Share
from nestpatch.measured import BENIGN, HARMFUL, LOOKALIKE

Rows = list[dict[str, Any]]
NAMES = {"nest": "shared deltas (NeST)", "lora": "LoRA, r = 8"}
SHARES = {
    "attack_plain": "attack success, plain",
    "attack_wrapped": "wrapped",
    "refusal_benign": "refusals, benign",
    "refusal_lookalike": "look-alike",
    "benign_correct": "benign correct",
    "incoherent": "incoherent",
}
_COMPARED = {
    "attack_plain": (HARMFUL, False),
    "attack_wrapped": (HARMFUL, True),
    "refusal_benign": (BENIGN, False),
    "refusal_lookalike": (LOOKALIKE, False),
}
"""Share -> the suites whose refusals it counts: their kind, and whether they are wrapped."""


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


def markdown(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, ["---"] * len(heads), *lines))


def frontier_table(rows: Rows) -> str:
    """One row for each setting, with shares in per cent and rises in points, each with the largest of its sets."""
    heads = (
        "tag",
        "method",
        "prompts",
        "strength",
        "seeds",
        "attack success",
        "rise, benign",
        "rise, look-alike",
        "KL",
        "perplexity",
    )
    lines = []
    for (tag, method, prompts, strength), group in settings(rows).items():
        sides = [
            f"{100 * mean(group, f'{name}_mean'):.1f} ({100 * mean(group, f'{name}_max'):.0f})"
            for name in ("attack", "rise_benign", "rise_lookalike")
        ]
        drift = (f"{mean(group, 'kl'):.3f}", f"{100 * mean(group, 'perplexity_rise'):+.1f} %")
        lines.append((tag, NAMES.get(method, method), prompts, strength, len(group), *sides, *drift))
    return markdown(heads, lines)


def cost_table(rows: Rows) -> str:
    """What each method trains and takes: medians over the seeds."""
    heads = ("tag", "method", "prompts", "trained", "bytes", "steps", "tune s", "other s", "tokens/s", "peak MB", "device")
    lines = []
    first = {key[:3]: group for key, group in reversed(settings(rows).items())}
    for (tag, method, prompts), group in reversed(first.items()):
        tune = statistics.median(row["seconds"]["tune"] for row in group)
        other = statistics.median(sum(row["seconds"].values()) for row in group) - tune
        middle = [
            statistics.median(row[name] for row in group)
            for name in ("trained", "bytes", "steps", "tokens_per_second", "peak_mb")
        ]
        trained, nbytes, steps, speed, peak = (f"{value:,.0f}" for value in middle)
        cells = (trained, nbytes, steps, f"{tune:.0f}", f"{other:.0f}", speed, peak, group[0]["device"])
        lines.append((tag, method, prompts, *cells))
    return markdown(heads, lines)


def share_table(rows: Rows) -> str:
    """The headline shares in per cent with their intervals, and in brackets the p-value of the difference from nest."""
    groups = settings(rows)
    bases = [row for row in rows if row["method"] == "base"]
    lines = [(row["tag"], "base", "", "", "", *(_share([row], name) for name in SHARES)) for row in bases]
    for (tag, method, prompts, strength), group in groups.items():
        nest = groups.get((tag, "nest", prompts, strength), [])
        tests = {name: p for name in _COMPARED if method != "nest" and (p := p_value(group, nest, name)) is not None}
        cells = [_share(group, name) + (f" [p {tests[name]:.2g}]" if name in tests else "") for name in SHARES]
        lines.append((tag, method, prompts, strength, len(group), *cells))
    return markdown(("tag", "method", "prompts", "strength", "seeds", *SHARES.values()), lines)


def switched_off_table(rows: Rows) -> str:
    """The headline shares without the selected neurons, for rows that were measured so; the base's own in the first line."""
    lines = []
    for (tag, method, prompts, strength), group in settings([row for row in rows if "switched_off" in row]).items():
        for who, key in ((f"base of {method}", "base_switched_off"), (method, "switched_off")):
            cells = [_share([row[key] for row in group], name) for name in SHARES]
            lines.append((tag, who, prompts, strength, len(group), *cells))
    return markdown(("tag", "neurons off", "prompts", "strength", "seeds", *SHARES.values()), lines) if lines else ""


def _share(group: Rows, name: str) -> str:
    """The mean over the seeds, with the interval."""
    shares = [row[name] for row in group if row[name] is not None]
    if not shares:
        return ""
    value = statistics.mean(share["count"] for share in shares)
    total = shares[0]["total"]
    low, high = Share(round(value), total).interval
    return f"{100 * value / total:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def p_value(group: Rows, other: Rows, name: str) -> float | None:
    """Whether two methods refuse the same prompts equally often: a two-sided sign test over the prompts.

    A prompt counts for the method that refused it with more seeds. With one seed this is McNemar's exact test.

    Args:
        group: Rows of one method.
        other: Rows of the other; only seeds that both have are compared.
        name: One of the headline shares.

    Returns:
        The p-value; None where there is nothing to compare.
    """
    theirs = {row["seed"]: row for row in other}
    pairs = [(row, theirs[row["seed"]]) for row in group if row["seed"] in theirs]
    balance: dict[tuple[str, int], int] = defaultdict(int)
    for ours, its in pairs:
        for suite, found in ours["suites"].items():
            peer = its["suites"].get(suite, {})
            if (found["kind"], found["wrapped"]) != _COMPARED[name] or peer.get("sha256") != found["sha256"]:
                continue
            for place, (a, b) in enumerate(zip(found["verdicts"], peer["verdicts"], strict=True)):
                balance[found["sha256"], place] += (a == "r") - (b == "r")
    if not balance:
        return None
    wins, losses = sum(value > 0 for value in balance.values()), sum(value < 0 for value in balance.values())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def suite_table(rows: Rows, tag: str, method: str) -> str:
    """Refusals of every set at strength 1, before and after, with the 95 % interval of as many prompts as the set has."""
    base = next(row for row in rows if row["method"] == "base" and row["tag"] == tag)
    group = [row for row in rows if (row["tag"], row["method"], row.get("strength")) == (tag, method, 1.0)]
    lines = []
    for suite, before in base["suites"].items():
        counts = [row["suites"][suite]["count"] for row in group]
        total = before["total"]
        low, high = Share(round(statistics.mean(counts)), total).interval
        seeds = ", ".join(f"{100 * count / total:.0f}" for count in counts)
        after = (f"{100 * statistics.mean(counts) / total:.1f}", f"{100 * low:.0f}-{100 * high:.0f}", seeds)
        lines.append((suite, total, f"{100 * before['value']:.1f}", *after))
    return markdown(("refusals, %", "prompts", "base", "patched", "95 % interval", "single seeds"), lines)


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
    names = dict.fromkeys(method for _, method, _ in lines)
    colours = {name: f"C{place}" for place, name in enumerate(names)} | {"nest": "#0a7d5a", "lora": "#b3541e"}
    amounts = sorted({prompts for _, _, prompts in lines})
    for (_, method, prompts), points in lines.items():
        shade = 0.35 + 0.65 * (amounts.index(prompts) + 1) / len(amounts)
        x, y, strengths = zip(*sorted(points, key=lambda point: point[2]), strict=True)
        label = f"{NAMES.get(method, method)}, {prompts:,} prompts of a kind"
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
    parser.add_argument("--tag", default="", help="the settings of the tables by set, and of the picture")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args(words)
    rows = read(given.files)
    print("\n\n".join(table(rows) for table in (share_table, frontier_table, cost_table, switched_off_table)).rstrip())
    of_tag = [row for row in rows if row["tag"] == given.tag]
    for method in dict.fromkeys(row["method"] for row in of_tag if row["method"] != "base"):
        print(f"\n{NAMES.get(method, method)}, strength 1:\n\n{suite_table(of_tag, given.tag, method)}")
    if given.picture:
        draw(of_tag, given.picture)


if __name__ == "__main__":
    main()
