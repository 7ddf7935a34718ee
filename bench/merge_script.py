"""What one writes without nestpatch: `python -m bench.merge_script MODEL PACK OUTPUT` adds a pack's deltas to a copy.

No base is checked, no digest compared and nothing can be undone. A pack is a safetensors file, so nothing else is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

from safetensors.torch import load_file, save_file


def main(model: str, pack: str, output: str) -> None:
    """Merges the pack into a copy of the model."""
    copytree(model, output, ignore=ignore_patterns("*.safetensors", ".nestpatch", "nestpatch.json"))
    weights, deltas = load_file(Path(model, "model.safetensors")), load_file(pack)
    for name in [key.removesuffix(":rows") for key in deltas if key.endswith(":rows")]:
        rows, cluster = deltas[f"{name}:rows"].long(), deltas[f"{name}:cluster"].long()
        change = deltas[f"{name}:delta"].float()[cluster]
        weights[name][rows] = (weights[name][rows].float() + change).to(weights[name].dtype)
    save_file(weights, Path(output, "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
