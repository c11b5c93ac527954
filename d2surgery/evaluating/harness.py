"""Tasks of EleutherAI's lm-eval harness on a model that is already in memory (extra `harness`)."""

import contextlib
import importlib.util
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.evaluating.tasks import Score


def harness_scores(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> list[Score]:
    """Which items of each task the model gets right, by the harness's own prompts and by its first metric that says
    right or wrong of every item (acc, exact_match …); `picked` is 0 for right and None for wrong, `gold` 0.

    A task is a name that the harness knows, or a YAML file that defines one. A group gives one score per task in it.
    Raises D2SurgeryError NO_HARNESS; USAGE for unknown tasks; NOT_RUNNABLE when the harness fails, as it does without
    a network for data that are not in its cache.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise refuse("NO_HARNESS", "lm-eval is not installed")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    raise_errors(
        Problem(code="USAGE", message="the harness knows no such task", got=name)
        for name in names
        if not manager.match_tasks([name])
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=names, limit=limit,
                task_manager=manager, log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise refuse("NOT_RUNNABLE", f"the harness failed: {reason}", got=", ".join(names)) from None
    return [_score(task, samples) for task, samples in found["samples"].items()]


def _name(file: Path) -> str:
    """What a YAML file calls its task. Not parsed as YAML: the harness's files hold tags of its own."""
    try:
        found = re.search(r"^task:\s*['\"]?([\w.-]+)", file.read_text(), re.MULTILINE)
    except FileNotFoundError:
        raise refuse("FILE_MISSING", "no such file", file=str(file)) from None
    if found is None:
        raise refuse("BAD_DATA", "it names no task", file=str(file))
    return found[1]


def _score(task: str, samples: Sequence[Mapping[str, Any]]) -> Score:
    rows = sorted(samples, key=lambda sample: sample["doc_id"])
    metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
    metric = next((name for name in metrics if all(row.get(name) in (0, 1) for row in rows)), None)
    if metric is None:
        got = ", ".join(metrics) or "none"
        raise refuse("NOT_RUNNABLE", "no metric says right or wrong of every item", module=task, got=got)
    picked = tuple(0 if row[metric] == 1 else None for row in rows)
    return Score(task=task, by=metric, gold=(0,) * len(rows), picked=picked, chance=None)
