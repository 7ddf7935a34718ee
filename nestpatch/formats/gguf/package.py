"""Modules of the `gguf` package, without what the package itself imports.

`import gguf` loads PyYAML and sentencepiece too: 38 ms and 6 MB of every command that reads a GGUF file.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def gguf_module(name: str) -> Any:
    """A module of the package: that of `gguf` itself where it is imported, else the same file under another name.

    Args:
        name: "constants", "quants", "tensor_mapping" or "utility", which import nothing but each other and numpy.

    Returns:
        The module.
    """
    return sys.modules.get(f"gguf.{name}") or import_module(f"{__name__}.{name}")


# What has a path is a package to Python, and is searched for its modules.
__path__ = list(getattr(find_spec("gguf"), "submodule_search_locations", None) or ())
