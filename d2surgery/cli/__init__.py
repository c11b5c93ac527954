"""The command line: `d2surgery VERB …`.

A verb is a module of this package with a click command named `command`, and a line in `VERBS`; it is imported only
when it runs, so that `--help` and light verbs stay fast. Errors become text and exit codes here and nowhere else.
"""

import atexit
import errno
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import click

from d2surgery.cli import output
from d2surgery.errors import D2SurgeryError, Problem, refuse
from d2surgery.machine import uncollected

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem  # which a shell asks for, and nobody else


class Verb(NamedTuple):
    heading: str
    summary: str
    example: str


VERBS = {
    "inspect": Verb("Look", "What an adapter is: kinds, ranks, scalings, problems.", "d2surgery inspect ./my-adapter"),
    "merge": Verb(
        "Operate",
        "Write a base with an adapter merged into it.",
        "d2surgery merge --base ./model --adapter ./my-adapter --out ./merged",
    ),
    "plan": Verb(
        "Operate",
        "What merge would write, need and keep; writes nothing.",
        "d2surgery plan --base ./model --adapter ./my-adapter --out ./merged",
    ),
    "audit": Verb(
        "Operate",
        "Is a merged checkpoint the base with the adapter?",
        "d2surgery audit --base ./model --adapter ./my-adapter --merged ./merged",
    ),
    "convert": Verb(
        "Surgery",
        "Another kind, with the error it makes.",
        "d2surgery convert ./my-dora ./my-lora --kind lora --base ./model --rank 32",
    ),
    "resize": Verb(
        "Surgery",
        "Fewer ranks: by number, criterion, error or budget.",
        "d2surgery resize ./my-adapter ./smaller --budget 8MB",
    ),
    "extract": Verb(
        "Surgery",
        "An adapter from a base and what was tuned from it.",
        "d2surgery extract --base ./model --tuned ./tuned --out ./my-adapter",
    ),
    "combine": Verb(
        "Surgery",
        "Several adapters as one: sums, TIES, DARE and others.",
        "d2surgery combine ./one:0.5 ./another:0.5 --out ./both",
    ),
    "scale": Verb(
        "Surgery",
        "Stronger, weaker, negated, or a part.",
        "d2surgery scale ./my-adapter 0.5 --out ./weaker",
    ),
    "train": Verb(
        "Train",
        "Fine-tune a base with an adapter of any of the four kinds.",
        "d2surgery train run.toml --output ./my-adapter",
    ),
    "spectrum": Verb(
        "Measure",
        "Singular values, norms and every rank of each module.",
        "d2surgery spectrum ./my-adapter --plot ranks.html",
    ),
    "drift": Verb(
        "Measure",
        "How far each module moves the base, in length and direction.",
        "d2surgery drift ./my-adapter --base ./model",
    ),
    "diff": Verb(
        "Measure",
        "What adapters have in common, beside what chance gives.",
        "d2surgery diff ./one-adapter ./another",
    ),
    "eval": Verb(
        "Measure",
        "Multiple-choice accuracy, unmerged or merged, or the gap between.",
        "d2surgery eval --base ./model --adapter ./my-adapter --tasks questions.jsonl",
    ),
    "report": Verb(
        "Measure",
        "One page, offline, with all of it: words, tables, figures.",
        "d2surgery report ./one-adapter ./another --base ./model --out report.html",
    ),
    "push": Verb(
        "Operate", "An output to the Hugging Face hub, with its card.", "d2surgery push ./merged my-org/my-model"
    ),
    "demo": Verb("Help", "The whole path on a small example it makes itself.", "d2surgery demo"),
    "explain": Verb("Help", "What a problem code or a number means and what to do.", "d2surgery explain MISSING_HALF"),
    "completion": Verb("Help", "Tab completion for bash, zsh and fish.", "d2surgery completion"),
}
FAILED = 2
INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell reports SIGPIPE
DEBUG = "--debug"
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Unable to allocate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 verdict fail, 2 not done, 3 inconclusive, 130 Ctrl-C.

    1 is a verdict and nothing else: whatever goes wrong, foreseen or not, is 2.
    """
    own = arguments is None
    if arguments is None:  # a process of its own, which need not walk over all of torch's objects before it ends: 0.4 s
        atexit.register(gc.freeze)
        arguments = sys.argv[1:]
    wanted = [argument for argument in arguments if argument != DEBUG]
    output.tolerate_any_text()
    if asked := os.environ.get("_D2SURGERY_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(_group, {}, "d2surgery", "_D2SURGERY_COMPLETE", asked)
    try:
        code = _run(wanted or ["--help"], own_process=own)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # piped into head: the reader has seen enough
        _let_go_of_stdout()
        return PIPE_CLOSED
    except BaseException as error:
        if DEBUG in arguments:
            import traceback

            for line in "".join(traceback.format_exception(error)).splitlines():
                output.emit(line, err=True)
        return _fail(_problems_of(error), as_json="--json" in wanted)


def _fail(problems: Sequence[Problem], *, as_json: bool) -> int:
    try:
        output.emit_failure(problems, as_json=as_json)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk or a closed pipe behind stdout: Python would fail again as it ends
        _let_go_of_stdout()
    return FAILED


def _let_go_of_stdout() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return  # there is none, or it is no file


def _problems_of(error: BaseException) -> Sequence[Problem]:
    """What to say of an error: ours as they are, the system's and the user's by name, others as a fault to report."""
    if isinstance(error, D2SurgeryError):
        return error.problems
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, OSError):
        return [_from_system(error)]
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or any(words in reason for words in _NO_MEMORY):
        return [Problem(code="OUT_OF_MEMORY", message=reason or "the system gave no more")]
    return [Problem(code="UNFORESEEN", message=f"{type(error).__name__}: {reason}")]


def _run(arguments: list[str], *, own_process: bool) -> int:
    try:
        with _group.make_context("d2surgery", arguments, obj=own_process) as context:
            code = _group.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    return code if isinstance(code, int) else 0


def _usage(error: click.ClickException) -> list[Problem]:
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "d2surgery"
    if isinstance(error, click.NoSuchOption):
        from d2surgery.cli import guessing  # which a line without a mistake needs none of

        near = guessing.option(error.option_name, context.command) if context else []
        wanted = " or ".join(near) or f"{verb} --help lists what there is"
        return [Problem(code="USAGE", message="no such option", file=verb, wanted=wanted, got=error.option_name)]
    return [Problem(code="USAGE", message=error.format_message(), file=verb)]


def _from_system(error: OSError) -> Problem:
    code = "DISK_FULL" if error.errno == errno.ENOSPC else "FILE_UNREADABLE"
    return Problem(code=code, message=error.strerror or str(error), file=str(error.filename or ""))


class _Lazy(click.Group):
    """Lists verbs from the table and imports the one that runs."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A mistyped verb is guessed; a job file after a verb gives its options."""
        if args and args[0] not in VERBS and not ctx.resilient_parsing and not args[0].startswith("-"):
            from d2surgery.cli import guessing

            wanted = " or ".join(guessing.verb(args[0], VERBS)) or "d2surgery --help lists them"
            raise refuse("USAGE", "no such verb", file="d2surgery", wanted=wanted, got=args[0])
        name, command, rest = super().resolve_command(ctx, args)
        if command is None or ctx.resilient_parsing or not (rest and rest[0].endswith(".toml")):
            return name, command, rest
        from d2surgery.cli import jobs  # and TOML with it

        return name, command, jobs.expanded(command, rest)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Verbs from the table: to import each for its help would take half a second."""
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=verb.summary) for name, verb in VERBS.items() if name.startswith(incomplete)]
        return verbs if incomplete[:1] != "-" else click.Command.shell_complete(self, ctx, incomplete)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        with uncollected():
            command: click.Command = import_module(f"d2surgery.cli.{cmd_name}").command
            if ctx.obj:  # a process of its own
                gc.freeze()  # and with it what `uncollected` imports later: to search it for garbage takes 0.15 s
        command.epilog = f"\b\nExample:\n  {VERBS[cmd_name].example}"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))
        for heading in dict.fromkeys(verb.heading for verb in VERBS.values()):
            with formatter.section(heading):
                rows = [(name.ljust(width), verb.summary) for name, verb in VERBS.items() if verb.heading == heading]
                formatter.write_dl(rows)
        with formatter.section("Examples"):
            formatter.write("".join(f"  {verb.example}\n" for verb in VERBS.values()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(DEBUG, is_flag=True, help="Anywhere on the line: with an error, also where in the code it came from.")
@click.version_option(package_name="d2surgery", message="%(prog)s %(version)s")
def _group(debug: bool) -> None:
    """Model surgery: inspect, measure, merge, audit and train LoRA, DoRA, Dual LoRA and D2-LoRA adapters.

    ADAPTER is a file, a directory, or a hub id org/name[@revision]; what exists locally is never downloaded.

    A job file stands for the options of a verb: `d2surgery merge job.toml`, with base = "…", adapter = "…", out = "…".

    Exit codes: 0 done or pass, 1 verdict fail, 2 could not be done, 3 inconclusive, 130 interrupted.
    """
