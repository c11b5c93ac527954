"""What goes into a base's modules on a text: the second moments by which conversions weigh their errors."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import refuse
from d2surgery.evaluating.traces import run
from d2surgery.live.attaching import name_in
from d2surgery.live.loading import load_model, tokenizer_of
from d2surgery.surveying.modules import Progress

TOKENS = 512  # of the text that go through the model together
_LETTERS = 1 << 16  # of the text that are read at a time


@torch.no_grad()
def input_moments(
    base: Path, text: Path, checkpoint: Checkpoint, *, progress: Progress = lambda done, total: None
) -> dict[str, Tensor]:
    """√E[x²] of each input of each adapted module (in_features,), over all tokens of a text, in the base alone.

    Of an embedding, whose inputs are tokens, √ of their shares. A module whose inputs cannot be seen (experts, a
    convolution) is left out. The text is streamed. Raises D2SurgeryError FILE_MISSING, USAGE, NOT_RUNNABLE.
    """
    tokenizer = tokenizer_of(base)
    pieces = _pieces(text)
    first = next(pieces)  # what is no text is said before a model is loaded
    model = load_model(base, dtype=torch.float32)
    named = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(module: str, size: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(owner: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0] if given and isinstance(given[0], Tensor) else torch.empty(0)
            if isinstance(owner, nn.Embedding):
                squares = torch.bincount(x.reshape(-1), minlength=size).double()
            elif x.shape[-1:] == (size,):
                squares = x.reshape(-1, size).double().square().sum(0)
            else:
                return
            sums[module] = sums[module] + squares if module in sums else squares
            counts[module] = counts.get(module, 0) + x.numel() // (1 if isinstance(owner, nn.Embedding) else size)

        return hook

    for entry in checkpoint.layout.adapters.values():
        name = name_in(model, named, entry.module)
        if name in named:
            named[name].register_forward_pre_hook(watch(entry.module, entry.in_features))
    step = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    done, whole = 0, text.stat().st_size
    for piece in chain([first], pieces):
        ids = tokenizer(piece, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        for start in range(0, len(ids), step):
            run(model, ids[None, start : start + step])
        done += len(piece.encode())
        progress(min(done, whole), whole)
    if not sums:
        raise refuse("USAGE", "the text has nothing that reaches an adapted module", file=str(text))
    return {module: (total / counts[module]).sqrt() for module, total in sums.items()}


def _pieces(path: Path) -> Iterator[str]:
    """A text, piece by piece. Raises FILE_MISSING, and USAGE for what is no text in UTF-8."""
    if not path.is_file():
        raise refuse("FILE_MISSING", "there is no such text", file=str(path))
    try:
        with path.open(encoding="utf-8") as file:
            piece = file.read(_LETTERS)
            if not piece.strip():
                raise refuse("USAGE", "the text is empty", file=str(path))
            while piece:
                yield piece
                piece = file.read(_LETTERS)
    except UnicodeDecodeError:
        raise refuse("USAGE", "no text in UTF-8", file=str(path)) from None
