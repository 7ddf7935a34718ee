"""Fixtures for everybody: no network, a lab of small size, tiny models of many families."""

from __future__ import annotations

import os
import tempfile

import pytest

# The user's own keys and memory are neither read nor changed.
os.environ.pop("NESTPATCH_HOME", None)
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="nestpatch-tests-")
# Some tests run as other users.
os.chmod(os.environ["XDG_CONFIG_HOME"], 0o777)  # noqa: PTH101
# pytest-xdist sets it, and output of a given width is wrapped.
os.environ.pop("COLUMNS", None)
# Before any Hugging Face library is imported: a test that reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What nobody foresaw fails a test instead of being named.
os.environ["NESTPATCH_TRACEBACK"] = "1"


def pytest_configure() -> None:
    # Tiny tensors gain nothing from a second thread, and on a busy machine lose minutes to it.
    try:
        import torch
    except ImportError:  # the deployment side is tested without it
        return
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Minutes in one test: with several processes it must not begin last.
    items.sort(key=lambda item: item.path.name != "test_demo.py")
