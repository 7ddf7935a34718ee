"""How adapters, and GGUF files that were checked by running them, look to a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestpatch.views.console import escape, fact_grid, out, size

if TYPE_CHECKING:
    from nestpatch.evaluation.parity import GgufParity
    from nestpatch.export.adapters import Adapter
    from nestpatch.export.models import Exported
    from nestpatch.export.onnx.exporter import ExportedOnnx
    from nestpatch.export.onnx.parity import Parity

VLLM_MAX_RANK = 512
"""The largest --max-lora-rank that vLLM takes."""


def show_adapter(done: Adapter) -> None:
    """What was exported, and how it is loaded."""
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"[bold]{escape(done.pack)}[/] {verb} [bold]{escape(done.output)}[/] in {done.seconds:.2f} s")
    rows = fact_grid()
    rows.add_row("adapter", f"{done.matrices} matrices, rank {done.rank} at most, {size(done.nbytes)}")
    if done.format == "gguf-lora":
        rows.add_row("llama.cpp", escape(f"llama-cli -m BASE.gguf --lora {done.output}"))
    elif done.format == "onnx-adapter":
        rows.add_row("onnxruntime", escape(f'adapter.Load("{done.output}"); run_options.add_active_adapter(adapter)'))
        rows.add_row("genai", escape(f'adapters.load("{done.output}", "nest"); generator.set_active_adapter(adapters, "nest")'))
    else:
        rows.add_row("PEFT", escape(f'PeftModel.from_pretrained(base, "{done.output}")'))
        if done.rank <= VLLM_MAX_RANK:
            rows.add_row("vLLM", f"--enable-lora --max-lora-rank {_rank_for_vllm(done.rank)}")
        else:
            rows.add_row("vLLM", f"[bold red]loads ranks up to {VLLM_MAX_RANK} only")
    out.print(rows)


def _rank_for_vllm(rank: int) -> int:
    """The least that holds a rank of those that vLLM takes."""
    return next(allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, VLLM_MAX_RANK) if allowed >= rank)


def show_check(check: GgufParity) -> None:
    """How a GGUF file compares with its model."""
    colour, verdict = ("green", "agrees with") if check.passed else ("bold red", "differs from")
    judged = "told, not judged: the file is quantized" if check.bound is None else f"allowed are {check.bound:.1e}"
    out.print(f"[{colour}]{escape(check.file.name)} {verdict} {escape(check.reference)}[/] in llama.cpp")
    rows = fact_grid()
    rows.add_row("token ids", f"the same for {check.same_ids.count} of {check.same_ids.total} texts")
    if check.first_text is not None:
        rows.add_row("", escape(f"first different: {check.first_text!r}"))
    amounts = f"differ by {check.largest:.1e} at most, by {check.typical:.1e} typically"
    judged += " typically, as experts may be chosen otherwise" if check.mixture and check.bound is not None else ""
    rows.add_row("logits", f"{amounts}; {judged}; their deviation is {check.deviation:.2f}")
    place = check.place
    where = f"token {place.token} after position {place.position} of {place.text!r}: {place.gguf:.6g} and {place.reference:.6g}"
    rows.add_row("where", escape(where))
    rows.add_row("top 1", f"the same at {check.top1.count} of {check.top1.total} positions ({check.top1.value:.1%})")
    out.print(rows)


def show_exported_onnx(done: ExportedOnnx) -> None:
    """What was written, and how far its logits are from the model's."""
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"{verb} [bold]{escape(done.path)}[/] in {done.seconds:.1f} s")
    grid = fact_grid()
    matrices = f", {done.matrices or 'its'} matrices in {done.bits} bits" if done.bits else ""
    grid.add_row("model", f"{escape(done.architecture + ', ' if done.architecture else '')}{escape(done.dtype)}{matrices}")
    grid.add_row("packs", escape(", ".join(done.packs) or "none"))
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


def show_exported(done: Exported) -> None:
    """What `export` wrote."""
    verb = "would write" if done.dry_run else "wrote"
    out.print(f"{verb} [bold]{escape(done.path)}[/] in {done.seconds:.2f} s")
    grid = fact_grid()
    nbytes = f", {size(done.nbytes)}" if done.nbytes else ""
    grid.add_row(
        "model",
        f"{escape(done.architecture + ', ' if done.architecture else '')}{done.tensors} tensors, {escape(done.type)}{nbytes}",
    )
    grid.add_row("packs", escape(", ".join(done.packs) or "none"))
    if done.sha256:
        grid.add_row("file", f"sha256 {escape(done.sha256)}")
    for note in done.notes:
        grid.add_row("note", escape(note))
    out.print(grid)
