"""How exported models and adapters look in a terminal, and GGUF files that were compared with their models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.export.results import VLLM_RANKS, ExportedGguf, ExportedOnnx, ExportedSafetensors
from nestpatch.views.console import escape, fact_grid, out, size

if TYPE_CHECKING:
    from nestpatch.evaluation.parity import GgufParity
    from nestpatch.export.results import ExportedAdapter
    from nestpatch.guarding.export import ExportedGuard


def show_exported(done: ExportedGguf | ExportedSafetensors | ExportedOnnx) -> None:
    """Prints an exported model: where it is, its type, the packs in it, and how an ONNX graph compares with its model.

    Args:
        done: What the exporter returned.
    """
    out.print(f"{'would write' if done.dry_run else 'wrote'} [bold]{escape(done.output)}[/] in {done.seconds:.2f} s")
    grid = fact_grid()
    architecture = "" if isinstance(done, ExportedSafetensors) else done.architecture
    if isinstance(done, ExportedOnnx):
        matrices = f", {done.matrices or 'its'} matrices in {done.bits} bits" if done.bits else ""
        what = f"{escape(done.dtype)}{matrices}"
    else:
        what = f"{done.tensors} tensors, {escape(done.type)}{f', {size(done.nbytes)}' if done.nbytes else ''}"
    grid.add_row("model", f"{escape(architecture + ', ' if architecture else '')}{what}")
    listed = escape(", ".join(done.packs) or "none")
    grid.add_row("packs", listed if done.strength == 1.0 else f"{listed}, at strength {done.strength:g}")
    if isinstance(done, ExportedGguf):
        if done.sha256:
            grid.add_row("file", f"sha256 {escape(done.sha256)}")
    else:
        for file in done.files:
            grid.add_row("file", f"{escape(file.name)}  {size(file.nbytes)}  sha256 {escape(file.sha256)}")
    if isinstance(done, ExportedOnnx):
        _add_parity(grid, done)
    for note in done.notes:
        grid.add_row("note", escape(note))
    out.print(grid)


def _add_parity(grid: Table, done: ExportedOnnx) -> None:
    """How far the logits of an ONNX graph are from those of its model, and whether it accepts packs."""
    if done.adapter_weights:
        grid.add_row("adapters", f"{done.adapter_weights} weights accept a pack at run time")
    for parity in done.parity:
        limit = f"limit {parity.bound:.1e}" if parity.bound is not None else "reported only: the graph is quantized"
        parts = f"{parity.plain:.1e}, padded {parity.padded:.1e}, in steps {parity.continued:.1e}"
        grid.add_row(
            escape(parity.type),
            f"logits differ from transformers by at most {parts}; {limit}; their deviation is {parity.deviation:.2f}; "
            f"top 1 the same at {parity.same} of {parity.positions} positions",
        )


def show_adapter(done: ExportedAdapter) -> None:
    """Prints an adapter: where it is, and how it is loaded.

    Args:
        done: What the exporter returned.
    """
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"[bold]{escape(done.pack)}[/] {verb} [bold]{escape(done.output)}[/] in {done.seconds:.2f} s")
    rows = fact_grid()
    rows.add_row("adapter", f"{done.matrices} matrices, rank {done.rank} at most, {size(done.nbytes)}")
    if done.strength != 1.0:
        rows.add_row("strength", f"{done.strength:g}, contained in the numbers: load it at scale 1")
    if done.format == "gguf-lora":
        rows.add_row("llama.cpp", escape(f"llama-cli -m BASE.gguf --lora {done.output}"))
    elif done.format == "onnx-adapter":
        rows.add_row("onnxruntime", escape(f'adapter.Load("{done.output}"); run_options.add_active_adapter(adapter)'))
        rows.add_row("genai", escape(f'adapters.load("{done.output}", "nest"); generator.set_active_adapter(adapters, "nest")'))
    else:
        rows.add_row("PEFT", escape(f'PeftModel.from_pretrained(base, "{done.output}")'))
        accepted = next((rank for rank in VLLM_RANKS if rank >= done.rank), None)
        if accepted is not None:
            rows.add_row("vLLM", f"--enable-lora --max-lora-rank {accepted}")
        else:
            rows.add_row("vLLM", f"[bold red]loads ranks up to {VLLM_RANKS[-1]} only")
    out.print(rows)


def show_guard(done: ExportedGuard) -> None:
    """Prints a guard: where it is, what it protects, and how a training uses it.

    Args:
        done: What `export_guard` returned.
    """
    guard = done.guard
    out.print(f"[bold]{escape(guard.pack)}[/] wrote [bold]{escape(done.output)}[/] in {done.seconds:.2f} s")
    rows = fact_grid()
    share = f"{100 * guard.directions:.0f} % of the directions of their inputs"
    what = f"{len(guard.matrices)} matrices, {share}, of {guard.prompts} harmful prompts, {size(done.nbytes)}"
    rows.add_row("guard", what)
    rows.add_row("Trainer", escape(f'callbacks=[nestpatch.GuardCallback("{done.output}")]'))
    out.print(rows)


def show_check(check: GgufParity) -> None:
    """Prints how a GGUF file in llama.cpp compares with its model in transformers.

    Args:
        check: What `check_gguf` returned.
    """
    colour, verdict = ("green", "agrees with") if check.passed else ("bold red", "differs from")
    limit = "reported only: the file is quantized" if check.bound is None else f"limit {check.bound:.1e}"
    if check.mixture and check.bound is not None:
        limit += " for the typical difference, as rounding may choose other experts"
    out.print(f"[{colour}]{escape(check.file.name)} {verdict} {escape(check.reference)}[/] in llama.cpp")
    rows = fact_grid()
    rows.add_row("token ids", f"the same for {check.same_ids.count} of {check.same_ids.total} texts")
    if check.first_text is not None:
        rows.add_row("", escape(f"first different: {check.first_text!r}"))
    amounts = f"differ by at most {check.largest:.1e}, typically by {check.typical:.1e}"
    rows.add_row("logits", f"{amounts}; {limit}; their deviation is {check.deviation:.2f}")
    place = check.place
    where = f"token {place.token} after position {place.position} of {place.text!r}: {place.gguf:.6g} and {place.reference:.6g}"
    rows.add_row("where", escape(where))
    rows.add_row("top 1", f"the same at {check.top1.count} of {check.top1.total} positions ({check.top1.value:.1%})")
    out.print(rows)
