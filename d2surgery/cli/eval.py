"""`d2surgery eval`: multiple-choice accuracy of a base, of it with an adapter live or merged, or the gap of the two."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2surgery.cli import output
from d2surgery.cli.options import BASE_HELP, DTYPE_NAMES, Base, device_option, progress_bar
from d2surgery.errors import refuse
from d2surgery.evaluating.items import TEMPLATES, WAYS, By, Task, Template, read_items, read_task
from d2surgery.files.plain import plain
from d2surgery.files.whole import require_folder, write_whole
from d2surgery.formats import open_layout
from d2surgery.live.quantization import QUANTIZATIONS
from d2surgery.machine import uncollected

if TYPE_CHECKING:
    from torch import nn

    from d2surgery.evaluating.freeform import Answers
    from d2surgery.evaluating.scoring import Models
    from d2surgery.evaluating.tasks import Progress, Score

_PATH = click.Path(path_type=Path)
_WORDS = {"likelihood": "likelihood", "normalised": "likelihood per byte", "generation": "its own words"}


class Ways(click.ParamType[tuple[By, ...]]):
    """`likelihood,generation`."""

    name = "ways"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[By, ...]:
        asked = [part.strip() for part in str(value).split(",")]
        if unknown := [way for way in asked if way not in WAYS]:
            self.fail(f"{', '.join(map(repr, unknown))}: the ways are {', '.join(WAYS)}", param, ctx)
        return tuple(way for way in WAYS if way in asked)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of each model, and how it answers."""

    files: tuple[Path, ...]
    more: tuple[Path, ...]
    """Files too, by position: `--tasks one.json two.json`."""
    harness: tuple[str, ...]
    free: tuple[Path, ...]
    """Files of items to be answered in the model's own words."""
    by: tuple[By, ...]
    limit: int | None
    template: Template


@click.command(name="eval")
@click.option("--base", type=Base(), required=True, help=f"{BASE_HELP}.")
@click.option("--adapter", help="File, directory or hub id org/name[@revision]; live in the base, not merged.")
@click.option("--merged", type=_PATH, help="Merged model directory. With --adapter: the gap between the two.")
@click.option(
    "--tasks", "files", type=_PATH, multiple=True, help="JSON or JSONL items, a table, a hub dataset; repeatable."
)
@click.option("--harness", multiple=True, help="Task of lm-eval, by name or YAML file; repeatable. Needs the extra.")
@click.option("--free", type=_PATH, multiple=True, help="Items to answer in its own words: perplexity, F1, ROUGE-L.")
@click.argument("more", type=_PATH, nargs=-1, metavar="[FILE]...")
@click.option("--by", "by", type=Ways(), default="likelihood", show_default=True, help=f"Of {', '.join(WAYS)}.")
@click.option("--limit", type=click.IntRange(min=1), help="Items per task, taken evenly.")
@click.option("--template", type=click.Choice(TEMPLATES), default="auto", show_default=True, help="Of the prompt.")
@click.option(
    "--dtype", type=click.Choice(sorted(DTYPE_NAMES)), help="To compute in. Default: fp32 on a CPU, else stored."
)
@click.option("--quantization", type=click.Choice(QUANTIZATIONS), help="Hold the base in 4 or 8 bit, as in training.")
@click.option("--items", "items_file", type=_PATH, help="Write every item's answers here, one JSON object a line.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print warnings only.")
def command(as_json: bool, quiet: bool, items_file: Path | None, **options: Any) -> int:
    """Accuracy on multiple-choice questions, with intervals.

    likelihood: the choice whose tokens are most probable after the prompt; normalised: the same per byte of the
    choice; generation: the choice that the model's own words name first. With --adapter and --merged both models
    answer the same questions, and the gap is judged pair by pair.

    --harness runs tasks of the lm-eval harness by its own prompts and metrics, in place of --tasks or beside them.

    --free asks for answers in the model's own words, of items with or without choices: perplexity per token of the
    right answers, exact match, token F1 and ROUGE-L of what it says. Tasks whose items share their choices (labels)
    also have Matthews' correlation and macro F1.

    A task is a JSON list or JSON lines, plain or gzip, of {"question", "choices", "answer"} or of the commonsense
    form {"instruction", "input", "output", "answer"}; with the extra `data` also a table (.parquet, .csv) or a dataset
    of the hub, such as allenai/ai2_arc:ARC-Easy:test.
    """
    asked = {name: options.pop(name) for name in ("base", "adapter", "merged", "quantization", "device", "dtype")}
    questions = Questions(**options)
    _check(asked, questions, items_file)
    output.hush("bitsandbytes")
    if questions.free:
        return _free(asked, questions, items_file, as_json=as_json, quiet=quiet)
    tasks = [read_task(path, questions.limit) for path in (*questions.files, *questions.more)]
    with uncollected():  # torch
        from d2surgery.evaluating.scoring import scores

    models = _models(**asked)
    with progress_bar("answering", show=not (as_json or quiet), unit=" items") as progress:
        found = scores(models, partial(_answers, tasks, questions), progress)
    if items_file is not None:
        write_whole(items_file, _items(found))
    labelled = {task.name for task in tasks if len({item.choices for item in task.items}) == 1}
    document = _document(found, labelled)
    if as_json:
        output.emit_json(_asked(models, questions) | document)
        return 0
    for line in () if quiet else _text(document):
        output.emit(line)
    return 0


def _models(dtype: str | None, **options: Any) -> "Models":
    """Which models answer, by the options of these names."""
    from d2surgery.evaluating.scoring import Models
    from d2surgery.files.tensors import DTYPES

    return Models(dtype=DTYPES[DTYPE_NAMES[dtype]] if dtype else None, **options)


def _check(asked: dict[str, Any], questions: Questions, items_file: Path | None) -> None:
    """Refuses before any work what could not be done."""
    chosen = bool(questions.files or questions.more or questions.harness)
    if not (chosen or questions.free):
        raise refuse("USAGE", "nothing to answer", wanted="--tasks FILE, --free FILE or --harness TASK")
    if chosen and questions.free:
        raise refuse("USAGE", "--free is a question of its own", wanted="--free FILE without tasks")
    if asked["quantization"] and asked["merged"] and not asked["adapter"]:
        raise refuse(
            "USAGE", "the base is not run, so --quantization has no effect", wanted="--adapter, or no --merged"
        )
    if items_file is not None:
        require_folder(items_file)
        if items_file.exists():
            raise refuse("OUTPUT_EXISTS", "not overwritten", file=str(items_file))
    if asked["adapter"]:
        open_layout(asked["adapter"])


def _answers(
    tasks: Sequence[Task], questions: Questions, model: "nn.Module", tokenizer: Any, progress: "Progress"
) -> "list[Score]":
    from d2surgery.evaluating.tasks import score_all

    by, template = questions.by, questions.template
    found = score_all(model, tokenizer, tasks, by=by, template=template, progress=progress)
    if questions.harness:
        from d2surgery.evaluating.harness import harness_scores

        found += harness_scores(model, tokenizer, questions.harness, limit=questions.limit)
    return found


def _free(asked: dict[str, Any], questions: Questions, items_file: Path | None, *, as_json: bool, quiet: bool) -> int:
    """Every file's items in the models' own words."""
    files = {path.name: read_items(path) for path in questions.free}
    if questions.limit is not None:
        files = {name: items[:: max(1, len(items) // questions.limit)][: questions.limit]
                 for name, items in files.items()}  # fmt: skip

    with uncollected():  # torch
        from d2surgery.evaluating.freeform import answers
        from d2surgery.evaluating.scoring import scores

    models = _models(**asked)

    def answer(model: "nn.Module", tokenizer: Any, progress: "Progress") -> "dict[str, Answers]":
        return {name: answers(model, tokenizer, items, template=questions.template, progress=progress)
                for name, items in files.items()}  # fmt: skip

    with progress_bar("answering", show=not (as_json or quiet), unit=" items") as progress:
        found = scores(models, answer, progress)
    if items_file is not None:
        lines = [{"model": model, "file": name, "item": at, "text": text} | record
                 for model, each in found.items() for name, one in each.items()
                 for at, (text, record) in enumerate(zip(one.texts, one.of_items, strict=True))]  # fmt: skip
        write_whole(items_file, "".join(json.dumps(line) + "\n" for line in lines))
    if as_json:
        means = {model: {name: _means(one) for name, one in each.items()} for model, each in found.items()}
        output.emit_json(_asked(models, questions) | {"models": means})
        return 0
    rows = [["", "items", "perplexity", "exact", "F1", "ROUGE-L", "F1, 95 %"]]
    for model, each in found.items():
        for name, one in each.items():
            shares = [_percent(share) for share in (one.exact, one.f1, one.rouge_l)]
            low, high = map(_percent, one.f1_ci)
            rows.append([f"{model}, {output.printable(name)}", str(len(one.texts)), output.number(one.perplexity),
                         *shares, f"{low} to {high}"])  # fmt: skip
    for line in () if quiet else output.table(rows):
        output.emit(line)
    return 0


def _means(one: "Answers") -> dict[str, Any]:
    left = asdict(one)
    return {name: left[name] for name in left if name not in ("texts", "of_items")} | {
        "items": len(one.texts), "perplexity": one.perplexity,
    }  # fmt: skip


def _asked(models: "Models", questions: Questions) -> dict[str, Any]:
    """What was asked, as JSON."""
    return {
        "base": str(models.base),
        "adapter": models.adapter,
        "merged": str(models.merged) if models.merged else None,
        "template": questions.template,
        "quantization": models.quantization,
    }


def _document(found: "dict[str, list[Score]]", labelled: Collection[str] = ()) -> dict[str, Any]:
    """Per model the accuracy of each task and their mean; with two models their gap."""
    document: dict[str, Any] = {"models": {name: _accuracies(each, labelled) for name, each in found.items()}}
    if len(found) == 2:
        from d2surgery.evaluating.behaviour import compare_scores

        gap = compare_scores(*found.values())
        problems = [output.record(problem) for problem in gap.problems]
        document |= {"task": plain(gap) | {"problems": problems}, "problems": problems}
    return document


def _accuracies(found: "Sequence[Score]", labelled: Collection[str]) -> dict[str, Any]:
    from d2surgery.evaluating.freeform import macro_f1, matthews
    from d2surgery.evaluating.paired import mean_accuracy

    means = {}
    for way in dict.fromkeys(score.by for score in found):
        counts = [(score.correct, len(score.gold)) for score in found if score.by == way]
        mean, interval = mean_accuracy(*zip(*counts, strict=True))
        means[way] = {"accuracy": mean, "ci": list(interval)}
    tasks = [
        {"task": s.task, "by": s.by, "items": len(s.gold), "accuracy": s.accuracy, "ci": list(s.interval),
         "unanswered": s.unanswered, "chance": s.chance} | (
            {"matthews": matthews(s.gold, s.picked), "macro_f1": macro_f1(s.gold, s.picked)}
            if s.task in labelled else {})
        for s in found
    ]  # fmt: skip
    return {"tasks": tasks, "mean": means}


def _items(answered: "dict[str, list[Score]]") -> str:
    """Every item's answers, one JSON object a line."""
    lines = []
    for model, found in answered.items():
        for score in found:
            record = asdict(score)
            for at, (gold, picked) in enumerate(zip(score.gold, score.picked, strict=True)):
                line = {"model": model, "task": score.task, "by": score.by, "item": at, "gold": gold, "picked": picked}
                details = {name: record[name][at] for name in ("log_likelihoods", "texts") if record[name]}
                lines.append(json.dumps(line | details))
    return "\n".join(lines) + "\n"


# Text ------------------------------------------------------------------------------------------------------------


def _text(document: dict[str, Any]) -> Iterator[str]:
    models = document["models"]
    for name, model in models.items():
        yield from output.prose(_verdict(name, model))
        yield ""
        rows = [["", "items", "right", "95 %", "chance", "unanswered"]]
        rows += [_row(task) for task in model["tasks"]]
        yield from output.table(rows)
        yield ""
    if "task" in document:
        yield from _gap(document["task"])


def _verdict(name: str, model: dict[str, Any]) -> str:
    means = []
    for way, mean in model["mean"].items():
        low, high = map(_percent, mean["ci"])
        means.append(f"{_percent(mean['accuracy'])} right by {_WORDS.get(way, way)} ({low} to {high})")
    return f"{name}: {', '.join(means)}, mean over tasks with its 95 % interval"


def _row(task: dict[str, Any]) -> list[str]:
    low, high = task["ci"]
    return [
        f"{output.printable(task['task'])}, {task['by']}",
        str(task["items"]),
        _percent(task["accuracy"]),
        f"{_percent(low)} to {_percent(high)}",
        "" if task["chance"] is None else _percent(task["chance"]),
        str(task["unanswered"]) if task["unanswered"] else "",
    ]


def _gap(gap: dict[str, Any]) -> Iterator[str]:
    low, high = gap["ci_pp"]
    yield from output.prose(
        f"merged − unmerged: {gap['gap_pp']:+.2f} points on average (95 % {low:+.2f} to {high:+.2f}), at worst "
        f"{gap['worst_gap_pp']:+.2f} ({gap['worst_task']}). {gap['gained']} answers became right, {gap['lost']} wrong; "
        f"McNemar p = {gap['mcnemar_p']:.2g}."
    )
    rows = [["", "gap", "95 %", "right → wrong", "wrong → right", "p"]]
    for one in gap["tasks"]:
        found = one["gap"]
        low, high = found["ci_pp"]
        interval = f"{low:+.2f} to {high:+.2f}"
        flips = [str(found["lost"]), str(found["gained"]), f"{found['mcnemar_p']:.2g}"]
        rows.append([f"{output.printable(one['task'])}, {one['by']}", f"{found['gap_pp']:+.2f}", interval, *flips])
    yield ""
    yield from output.table(rows)
    within = f"a gap of {gap['margin_pp']:g} points or more is {'' if gap['equivalent'] else 'not '}refuted"
    yield f"  {within} (two one-sided tests at 5 %)"
    for problem in gap["problems"]:
        yield ""
        colour = output.COLOURS[problem["severity"]]
        details = "; ".join(f"{k} {problem[k]}" for k in ("wanted", "got") if problem[k])
        yield from output.prose(
            f"{output.style(problem['severity'], colour)} {problem['code']}{' ' * bool(problem['module'])}"
            f"{problem['module']}: {problem['message']} ({details})"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
