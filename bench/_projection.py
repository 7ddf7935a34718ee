"""Rows blended with their projection on the alignment: FGSN, later MSCP (arXiv 2508.09190), as a pack.

`python -m bench._projection TUNED BASE ALIGNED SHARE OUTPUT`. It is no command of nestpatch, because it restores
nothing: bench/LOG.md has the numbers. Rows that the alignment changed become (1 - SHARE) W + SHARE (D D^T W) / numel(D), where
D is ALIGNED - BASE.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from nestpatch.formats.checkpoint import Checkpoint, IntArray, float_rows, row_blocks
from nestpatch.pack import Label
from nestpatch.restore._models import matrices, open_models
from nestpatch.restore._rows import Made, norms, pack_rows, row_changes, stored_as, write_pack
from nestpatch.rows import FloatArray, Rows


def projection(tuned: Checkpoint, base: Checkpoint, aligned: Checkpoint, name: str, masked: IntArray) -> FloatArray:
    """Rows of D D^T W / numel(D), without the square matrix: D_masked D^T W is summed over blocks of rows.

    Args:
        tuned: Has W.
        base: D is ALIGNED - BASE.
        aligned: The other side of D.
        name: The matrix.
        masked: Which rows, sorted.

    Returns:
        float32 [masked, in_features].
    """
    info = tuned.info(name)
    ours = float_rows(aligned, name, masked) - float_rows(base, name, masked)
    total = np.zeros_like(ours)
    for part in row_blocks(info.rows, 16 * (info.shape[-1] + len(masked))):
        block = np.arange(part.start, part.stop)
        change = float_rows(aligned, name, block) - float_rows(base, name, block)
        total += (ours @ change.T) @ float_rows(tuned, name, block)
    return total / np.float32(info.rows * info.shape[-1])


def main() -> None:
    """Writes the pack, and prints the norm of the projected rows relative to that of the rows."""
    tuned, base, aligned = (Path(word) for word in sys.argv[1:4])
    share, output = np.float32(sys.argv[4]), Path(sys.argv[5])
    models = open_models({"TUNED": tuned, "BASE": base, "ALIGNED": aligned})
    roles = tuple(models.values())
    made, ratios = [], []
    for name in matrices(models):
        masked = row_changes(*roles, name).candidates
        if not len(masked):
            continue
        projected, now = projection(*roles, name, masked), float_rows(roles[0], name, masked)
        ratios.append(norms(projected) / norms(now))
        blended = stored_as(roles[0].info(name), (1 - share) * now + share * projected)
        packed, inexact = pack_rows(roles[0], name, masked, partial(_picked, masked, blended))
        made += [Made(packed, len(masked), inexact)] if packed is not None else []
    done = write_pack("projection", roles[0], made, Label("projection"), output, {"share": float(share)})
    print(json.dumps({**done.as_json(), "norm_ratio": float(np.median(np.concatenate(ratios)))}))


def _picked(masked: IntArray, blended: Rows, rows: IntArray) -> Rows:
    picked: Rows = blended[np.searchsorted(masked, rows)]
    return picked


if __name__ == "__main__":
    main()
