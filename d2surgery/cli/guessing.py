"""What a mistyped verb or option may have meant: the options that people try first, else the nearest names."""

from collections.abc import Iterable, Iterator

import click

SYNONYMS = {  # what other tools call it -> what it may be called here, the first that the verb has
    "--learning-rate": ("--lr",),
    "--lr": ("--learning-rate",),
    "--output": ("--out", "--output"),
    "--output-dir": ("--out", "--output"),
    "--output-path": ("--out", "--output"),
    "--save": ("--out", "--output"),
    "--out": ("--output",),
    "-o": ("--out", "--output"),
    "--model": ("--base",),
    "--base-model": ("--base",),
    "--model-name-or-path": ("--base",),
    "--base-model-name-or-path": ("--base",),
    "--lora": ("--adapter",),
    "--peft": ("--adapter", "--to"),
    "--adapters": ("--adapter",),
    "--adapter-path": ("--adapter",),
    "--weight": ("--strength",),
    "--multiplier": ("--strength",),
    "--lora-scale": ("--strength", "--scale"),
    "--scaling": ("--scale",),
    "--lora-alpha": ("--alpha",),
    "--r": ("--rank",),
    "--lora-r": ("--rank",),
    "--lora-rank": ("--rank",),
    "--new-rank": ("--rank",),
    "--precision": ("--dtype",),
    "--torch-dtype": ("--dtype",),
    "--bf16": ("--dtype",),
    "--fp16": ("--dtype",),
    "--max-shard-size": ("--shard-size",),
    "--epochs": ("--epochs", "--num-epochs"),
    "--num-train-epochs": ("--epochs",),
    "--batch-size": ("--batch-size", "--batch"),
    "--per-device-train-batch-size": ("--batch-size", "--batch"),
    "--max-seq-length": ("--max-length",),
    "--data": ("--train", "--tasks"),
    "--dataset": ("--train", "--tasks"),
    "--train-file": ("--train",),
    "--load-in-4bit": ("--quantization",),
    "--load-in-8bit": ("--quantization",),
    "--plot-file": ("--plot",),
    "--html": ("--plot", "--out"),
    "--overwrite": ("--force",),
    "--verbose": ("--per-layer",),
    "-v": ("--per-layer",),
}


def option(given: str, command: click.Command) -> list[str]:
    """What of a verb an unknown option may have meant, at most three; what has no option is an argument."""
    known = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    known = [name for name in known if name.startswith("-")]
    plain = given.lower().replace("_", "-")
    names = (plain, *SYNONYMS.get(plain, ()))
    if of_place := [text for name in names for text in _arguments(name.strip("-"), command)]:
        return of_place[:1]
    meant = [name for name in names if name in known]
    words = [name for name in known if plain.strip("-") and plain.strip("-") in name.strip("-").split("-")]
    return list(dict.fromkeys([*meant, *_near(plain, known), *words]))[:3]


def _arguments(name: str, command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Argument) and parameter.name in (name, f"{name}s"):
            yield f"{parameter.human_readable_name} without a name before it"


VERBS = {  # what other tools call a verb
    "info": "inspect", "show": "inspect", "describe": "inspect", "compare": "diff", "check": "audit",
    "verify": "audit", "test": "audit", "fuse": "merge", "bake": "merge", "apply": "merge", "fit": "train",
    "finetune": "train", "fine-tune": "train", "evaluate": "eval", "svd": "resize", "compress": "resize",
    "prune": "resize", "ranks": "spectrum", "rank": "spectrum", "export": "convert", "help": "explain",
    "unmerge": "extract", "add": "combine", "average": "combine", "dry-run": "plan", "upload": "push",
}  # fmt: skip


def verb(given: str, known: Iterable[str]) -> list[str]:
    names = list(known)
    plain = given.lower().replace("_", "-")
    meant = [VERBS[plain]] if VERBS.get(plain) in names else []
    return list(dict.fromkeys([*meant, *_near(plain, names)]))[:3]


def _near(given: str, known: Iterable[str]) -> list[str]:
    from difflib import get_close_matches  # seldom needed

    return get_close_matches(given, list(known), n=3, cutoff=0.55)
