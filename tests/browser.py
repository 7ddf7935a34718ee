"""A headless Chromium, and what it says about a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "no chromium, chromium-browser or google-chrome is installed"
_SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_CONTRAST = """() => {
  const channels = (text) => { const n = (text.match(/[\\d.]+/g) || []).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (node) => { for (let n = node; n; n = n.parentElement) {
    const c = channels(getComputedStyle(n).backgroundColor); if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('svg title, svg desc')) continue;
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const ink = channels(node.closest('svg') ? style.fill : style.color);
    const [a, b] = [luminance(ink), luminance(behind(node))].sort((x, y) => y - x);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push([(a + .05) / (b + .05), large ? 3 : 4.5, walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""
"""Every visible text -> [contrast with what is behind it, the least that WCAG 2 AA asks, the text]."""
_FOCUSED = """() => { const e = document.activeElement, s = getComputedStyle(e);
  return [e.tagName, e.textContent.trim().slice(0, 40), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2]; }"""


@dataclass
class Opened:
    """A page in the browser."""

    page: Any
    messages: list[str]
    """What it wrote to the console, errors and blocked requests included."""
    requests: list[str]
    """The addresses that it asked for."""

    def unfold(self) -> None:
        """Opens everything that is folded away."""
        self.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def contrasts(self) -> list[tuple[float, float, str]]:
        """Of every visible text: its contrast, what it has to be, the text."""
        return [tuple(one) for one in self.page.evaluate(_CONTRAST)]

    def tab(self) -> tuple[str, str, bool]:
        """Goes on to the next element by the keyboard: its tag, its text, whether the focus is seen."""
        self.page.keyboard.press("Tab")
        tag, text, seen = self.page.evaluate(_FOCUSED)
        return tag, text, seen


class Browser:
    """A running Chromium with a new, empty profile."""

    def __init__(self, process: Any) -> None:
        self._process = process

    @contextmanager
    def open(self, file: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen") -> Iterator[Opened]:
        """Opens a file."""
        context = self._process.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        opened = Opened(page, [], [])
        page.emulate_media(media=media, color_scheme=scheme)
        page.on("console", lambda message: opened.messages.append(message.text))
        page.on("pageerror", lambda error: opened.messages.append(str(error)))
        page.on("dialog", lambda dialog: (opened.messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(file.absolute().as_uri())
        yield opened
        context.close()


@contextmanager
def started() -> Iterator[Browser]:
    """Starts Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        process = driver.chromium.launch(executable_path=CHROMIUM, args=list(_SWITCHES))
        yield Browser(process)
        process.close()
