"""The frozen layers below the first patched one: their outputs, and the base's own, are computed once for all examples.

A step of the tuning then runs the upper layers alone, and the divergence from the base needs no second forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train._free import free_on
from nestpatch.runtimes.sharded import is_sharded
from nestpatch.runtimes.states import layers_of
from nestpatch.runtimes.text import IGNORED, TokenPair, collate
from nestpatch.runtimes.weights import MlpBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 32
"""Examples that are computed together once, at most."""
_SHARE = 0.25
"""Of an accelerator's free memory, for stored states: the rest is for the steps."""
_TOLERANCE = 0.2
"""Mean change of the likely tokens' log-probabilities, in nats, that is still rounding: bfloat16 gives up to 0.1, a layer that
is wrongly skipped several nats."""


class _InPlaceOf(nn.Module):
    """In the place of a layer during a step, without its parameters. Attributes are those of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)


class _Skipped(_InPlaceOf):
    """A layer below the first patched one: gives what the last of them gave when it was computed."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__(layer)
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        """Anything -> [batch, tokens, width], in a tuple where the layer returns one."""
        return self.output


class _Checkpointed(_InPlaceOf):
    """Keeps the layer's input alone, and computes the layer again in the backward pass.

    transformers does so in training mode alone, in which some architectures drop activations out.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer."""
        if not torch.is_grad_enabled():
            return self.layer(*args, **kwargs)
        return checkpoint(self.layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _Store:
    """Rows of hidden states of many examples: on the accelerator where it has room, else in a file mapped into memory.

    Args:
        path: The file.
        rows: How many there will be.
        like: [..., width], such states.
    """

    def __init__(self, path: Path, rows: int, like: torch.Tensor) -> None:
        width = like.shape[-1]
        if like.device.type != "cpu" and rows * width * like.itemsize < _SHARE * free_on(like.device):
            self._rows = like.new_empty(rows, width)
        else:
            self._rows = torch.from_file(str(path), shared=True, size=rows * width, dtype=like.dtype).view(rows, width)
        self._places: dict[TokenPair, slice] = {}
        self._end = 0

    def put(self, pair: TokenPair, rows: torch.Tensor) -> None:
        """Stores the rows of one example."""
        place = slice(self._end, self._end + len(rows))
        self._rows[place] = rows.to(self._rows.device)
        self._places[pair], self._end = place, place.stop

    def get(self, pair: TokenPair) -> torch.Tensor:
        """[rows, width]."""
        return self._rows[self._places[pair]]


class Trunk:
    """Answers of a model whose lower layers are frozen.

    Args:
        model: The frozen base, without deltas.
        blocks: Its feed-forward blocks.
        first: The lowest layer that deltas will be attached to.
        pad: The id of the padding token.

    Attributes:
        checkpointing: Whether the computed layers keep their inputs alone for the backward pass. Without effect where
            `layers` is 0.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[MlpBlock], first: int, pad: int) -> None:
        self._model, self._pad = model, pad
        self._layers, self._start = layers_of(model, next(block for block in blocks if block.layer == first))
        self._head: nn.Module = model.get_output_embeddings()
        self._hidden: _Store | None = None
        self._final: _Store | None = None
        self._packed = False
        self.checkpointing = False

    @property
    def layers(self) -> int:
        """Layers from the first patched one on; 0 where the architecture has no list of layers."""
        return len(self._layers) - self._start

    @property
    def sharded(self) -> bool:
        """Whether the base is divided between processes, which then make the same passes."""
        return is_sharded(self._model)

    def remember(
        self,
        pairs: Sequence[TokenPair],
        harmless: Sequence[TokenPair],
        folder: Path,
        on_event: OnEvent = ignore,
        batch: int = _BATCH,
    ) -> tuple[str, str]:
        """Runs all examples through the base once.

        Args:
            pairs: All examples.
            harmless: Those of them whose base log-probabilities are needed.
            folder: Where the hidden states are stored: memory does not grow with the examples.
            on_event: Called with the progress.
            batch: Examples that are computed together, at most; more than 32 are not.

        Returns:
            (which layers a step computes from now on, why).
        """
        unique, wanted = list(dict.fromkeys(pairs)), set(harmless)
        seen = self._seen(unique[:1])
        if self._start:
            rows = sum(len(pair.prompt) + len(pair.answer) for pair in unique)
            self._hidden = _Store(folder / "hidden", rows, seen["hidden"])
        self._final = _Store(folder / "final", sum(len(pair.answer) for pair in wanted), seen["final"])
        order = sorted(unique, key=lambda pair: len(pair.prompt) + len(pair.answer))
        size = min(batch, _BATCH)
        for start in range(0, len(order), size):
            self._remember_batch(order[start : start + size], wanted)
            on_event(Event("remember", min(start + size, len(order)), len(order)))
        return self._checked([*order[:2], *order[2:][-2:]], size)

    def _remember_batch(self, batch: Sequence[TokenPair], wanted: set[TokenPair]) -> None:
        seen, begin = self._seen(batch), 0
        for row, pair in enumerate(batch):
            if self._hidden is not None:
                self._hidden.put(pair, seen["hidden"][row, : len(pair.prompt) + len(pair.answer)])
            if self._final is not None and pair in wanted:
                self._final.put(pair, seen["final"][begin : begin + len(pair.answer)])
            begin += len(pair.answer)

    @torch.no_grad()
    def _seen(self, batch: Sequence[TokenPair]) -> dict[str, torch.Tensor]:
        """Runs a batch: what enters the first patched layer, [batch, tokens, width], and the head, [answer tokens, width]."""
        ids, mask, labels = collate(batch, self._pad, self._model.device)
        with self._watched() as seen, self._answers(labels):
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen

    @contextmanager
    def _watched(self) -> Iterator[dict[str, torch.Tensor]]:
        """Fills a dict with what enters the first patched layer, and, inside `_answers`, what enters the head."""
        seen: dict[str, torch.Tensor] = {}

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen["hidden"] = (args[0] if args else kwargs["hidden_states"]).detach()

        def look(_: nn.Module, __: Any, output: Any) -> None:
            self._packed = isinstance(output, tuple)

        def final(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen["final"] = args[0][0].detach()

        handles = [self._head.register_forward_pre_hook(final)]
        if self._start:
            layer = self._layers[self._start]
            handles += [layer.register_forward_pre_hook(keep, with_kwargs=True), layer.register_forward_hook(look)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _answers(self, labels: torch.Tensor, extra: torch.Tensor | None = None) -> Iterator[None]:
        """Inside, the head sees the positions that predict answers alone, as one sequence, then the rows of `extra`."""
        wanted = labels[:, 1:] != IGNORED

        def select(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            rows = args[0][:, :-1][wanted]
            return ((rows if extra is None else torch.cat([rows, extra]))[None],)

        handle = self._head.register_forward_pre_hook(select, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _replaced(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """Inside, the layers below the first patched one give `hidden`, and the others are checkpointed where that is wanted.

        What enters the first patched layer must not come from a hook on it: a checkpointed layer is computed again later.
        """
        layers = list(self._layers)
        if hidden is not None:
            for number, layer in enumerate(layers[: self._start]):
                self._layers[number] = _Skipped(layer, (hidden, None) if self._packed else hidden)
        if self.checkpointing:
            for number, layer in enumerate(layers[self._start :], self._start):
                self._layers[number] = _Checkpointed(layer)
        try:
            yield
        finally:
            for number, layer in enumerate(layers):
                self._layers[number] = layer

    def logits(self, batch: Sequence[TokenPair], harmless: Sequence[TokenPair] = ()) -> tuple[Any, Any, Any]:
        """The predictions of the answers of a batch, by the model as it is now and by the base.

        Args:
            batch: Examples that `remember` has seen.
            harmless: Examples of the batch, in its order, whose base predictions are needed.

        Returns:
            (logits, labels, base): float32 [answer tokens, vocabulary], int64 [answer tokens], and for the answers of
            `harmless` float32 [their tokens, vocabulary], without a gradient.
        """
        ids, mask, labels = collate(batch, self._pad, self._model.device)
        wanted = labels[:, 1:] != IGNORED
        extra = None
        if harmless and self._final is not None:
            extra = torch.cat([self._final.get(pair) for pair in harmless]).to(self._model.device)
        hidden = None
        if self._hidden is not None:
            rows = [self._hidden.get(pair) for pair in batch]
            hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._model.device)
            hidden = nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - hidden.shape[1]))
        with self._answers(labels, extra), self._replaced(hidden):
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        count = int(wanted.sum())
        return logits[:count].float(), labels[:, 1:][wanted], logits[count:].detach().float()

    def _checked(self, pairs: Sequence[TokenPair], size: int) -> tuple[str, str]:
        """Compares the shortened model with the whole one; where they differ the lower layers are computed at every step."""
        if self._hidden is None:
            return "all layers", "the first one is patched" if len(self._layers) else "this architecture has no list of layers"
        try:
            gap = fmean(self._gap(pairs[start : start + size]) for start in range(0, len(pairs), size))
        except Exception as error:  # whatever an architecture does with layers that are not its own
            if should_reduce_batch_size(error):
                raise
            problem = f"frozen layers of this architecture cannot be skipped: {type(error).__name__}: {error}"
        else:
            if gap <= _TOLERANCE:  # not NaN
                return f"from layer {self._start}", "the layers below are frozen, and their outputs are stored"
            problem = f"skipping frozen layers changes the answers of this architecture by {gap:.2g} nats"
        self._hidden = None
        return "all layers", problem

    @torch.no_grad()
    def _gap(self, pairs: Sequence[TokenPair]) -> float:
        """How much the log-probabilities of the shortened model differ from those of the whole one, in nats."""
        short = self.logits(pairs)[0].log_softmax(-1)
        stored, self._hidden = self._hidden, None
        whole = self.logits(pairs)[0].log_softmax(-1)
        self._hidden = stored
        # Log-probabilities of unlikely tokens are rounded coarsely, and do not matter.
        return float(((short - whole).abs() * whole.exp()).sum(-1).mean())
