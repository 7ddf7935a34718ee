"""How exports to ONNX look to a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestpatch.views import _grid, escape, out, size

if TYPE_CHECKING:
    from nestpatch.onnx_export.parity import Parity
    from nestpatch.onnx_export.to_onnx import ExportedOnnx


def show_exported_onnx(done: ExportedOnnx) -> None:
    """What was written, and how far its logits are from the model's."""
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"{verb} [bold]{escape(done.path)}[/] in {done.seconds:.1f} s")
    grid = _grid()
    matrices = f", {done.matrices or 'its'} matrices in {done.bits} bits" if done.bits else ""
    grid.add_row("model", f"{escape(done.architecture + ', ' if done.architecture else '')}{escape(done.dtype)}{matrices}")
    grid.add_row("patches", escape(", ".join(done.patches) or "none"))
    for file in done.files:
        grid.add_row("file", f"{escape(file.name)}  {size(file.nbytes)}  sha256 {escape(file.sha256)}")
    if done.adapter_weights:
        grid.add_row("adapters", f"{done.adapter_weights} weights take a patch at run time")
    for parity in done.parity:
        grid.add_row(escape(parity.type), _told(parity))
    for note in done.notes:
        grid.add_row("note", escape(note))
    out.print(grid)


def _told(parity: Parity) -> str:
    """One comparison with transformers."""
    allowed = f"allowed are {parity.bound:.1e}" if parity.bound is not None else "told, not judged: it is quantized"
    parts = f"{parity.plain:.1e}, padded {parity.padded:.1e}, in steps {parity.continued:.1e}"
    return (
        f"logits differ from transformers by {parts} at most; {allowed}; their deviation is {parity.deviation:.2f}; "
        f"top 1 the same at {parity.same} of {parity.positions} positions"
    )
