"""What tests of training share: a tiny base with a tokenizer of characters, items, and a config of a few steps."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import byte_tokenizer, llama
from safetensors.torch import load_file
from torch import Tensor

from d2surgery.training.config import parse
from d2surgery.training.loop import train
from d2surgery.training.settings import TrainConfig

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def write_base(path: Path) -> Path:
    torch.manual_seed(0)
    llama(vocab_size=258, max_position_embeddings=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_items(path: Path, count: int = 40, start: int = 0) -> Path:
    names = ["even", "odd"]
    items = [
        {"question": f"is {n} even?", "choices": names, "answer": names[n % 2]} for n in range(start, start + count)
    ]
    path.write_text(json.dumps(items))
    return path


def config_of(folder: Path, kind: str = "lora", **sections: Mapping[str, Any]) -> TrainConfig:
    """Eight steps of four rows on the base and items in `folder`; sections update those of the file."""
    document: dict[str, Any] = {
        "base": str(folder / "base"),
        "output": str(folder / "out"),
        "adapter": {"kind": kind, "rank": 4},
        "data": {"train": [str(folder / "items.json")], "held_out_limit": 8, "max_length": 64, "template": "plain"},
        "optimizer": {"steps": 8, "batch": 4, "lr": 0.01, "warmup": 0.0},
        "run": {"device": "cpu", "log_every": 4, "save_every": 3, "eval_every": 4},
    }
    for name, values in sections.items():
        document[name] = {**document[name], **values} if isinstance(values, Mapping) else values
    return parse(document)


def tensors(directory: Path | str) -> dict[str, Tensor]:
    """The adapter's tensors, read by safetensors itself."""
    found: dict[str, Tensor] = load_file(Path(directory) / "adapter_model.safetensors")
    return found


def lines(directory: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    read = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read]


def same(one: Path | str, other: Path | str) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def die_after_step(config: TrainConfig, step: int) -> None:
    """Train, and be killed by SIGKILL when a step is done."""
    torch.set_num_threads(1)
    train(config, progress=lambda done, total: _die() if done == step else None)


def die_in_checkpoint(config: TrainConfig, step: int) -> None:
    """Train, and be killed by SIGKILL halfway through writing the checkpoint of a step."""
    torch.set_num_threads(1)
    whole_save, reached = torch.save, [0]

    def progress(done: int, total: int) -> None:
        reached[0] = done

    def save(value: Any, path: Any, *rest: Any, **options: Any) -> None:
        if reached[0] == step and str(path).endswith("scheduler.pt"):
            _die()
        whole_save(value, path, *rest, **options)

    torch.save = save  # type: ignore[assignment]
    train(config, progress=progress)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
