"""Harmful suites inside jailbreak templates: suites of their own, of a fixed sample of all combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nestpatch.errors import DataError, PromptDataError
from nestpatch.evaluation.suites import Suite
from nestpatch.measured import HARMFUL
from nestpatch.prompts.builtin import JAILBREAK, PREFIX, WRAPPERS
from nestpatch.prompts.jailbreaks import SLOT, fill, spread
from nestpatch.prompts.readers import PromptSet, load_prompts

TEMPLATES_EACH = 3
"""Templates that each prompt is put into: more of them measure the templates, not the prompts."""
BUILTIN = "builtin"


def load_templates(source: str) -> tuple[str, ...]:
    """Reads jailbreak templates.

    Args:
        source: "builtin", or a file as `load_prompts` reads it: one template in each row, with {prompt} where the request goes.

    Returns:
        The templates.

    Raises:
        PromptDataError: The file cannot be read, or a template does not contain {prompt}.
    """
    texts = [prompt.text for prompt in load_prompts(PREFIX + WRAPPERS if source == BUILTIN else source).prompts]
    for number, text in enumerate(texts, start=1):
        if SLOT not in text:
            raise PromptDataError(
                f"{source}, template {number}: there is no {SLOT} in {text[:60]!r}",
                advice=f"Write {SLOT} where the request goes.",
            )
    return tuple(texts)


def with_jailbreaks(suites: Sequence[Suite], templates: Sequence[str]) -> list[Suite]:
    """Adds to every harmful suite one of the same prompts inside jailbreak templates.

    Each prompt is put into TEMPLATES_EACH templates, or all where there are fewer; all templates are used equally often.

    Args:
        suites: What is evaluated. The built-in jailbreak suite, which consists of templates already, is left alone.
        templates: From `load_templates`.

    Returns:
        All suites; "advbench+jailbreak" comes after "advbench".

    Raises:
        DataError: There is no harmful suite.
    """
    found: list[Suite] = []
    for suite in suites:
        found.append(suite)
        if suite.kind == HARMFUL and suite.name != PREFIX + JAILBREAK:
            pairs = spread(suite.prompts.prompts, templates, TEMPLATES_EACH)
            prompts = dict.fromkeys(replace(prompt, text=fill(template, prompt.text)) for prompt, template in pairs)
            found.append(Suite(HARMFUL, PromptSet(f"{suite.name}+jailbreak", tuple(prompts))))
    if len(found) == len(suites):
        raise DataError("there is no harmful suite to put into jailbreak templates", advice="Add one: --suite harmful=FILE")
    return found
