"""Pages that are true: the commands, snippets and files on a page, run in an empty folder that holds `demo`.

What a page may hold, by the language of the block:

    console   `$ d2surgery …` and what it prints, both streams. `…` on a line of its own stands for lines left out;
              `$ echo $?` prints the exit code of the command above it
    sh        commands without what they print, which must succeed; `#` begins a comment. Those of other programs are
              in `ELSEWHERE`, and are not run
    python    run as one script per page; a `text` block right under it is what it prints
    title="x" a file of that name, for what comes after
"""

import contextlib
import io
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2surgery.cli import main

ELSEWHERE = {
    "pip": ".ci/run, .ci/wheel", "python3": ".ci/run, .ci/wheel", "pipx": "not run", "uvx": "not run",
    "docker": "not run", "mkdocs": ".ci/docs", "torchrun": "tests/training", "accelerate": "tests/training",
    "git": "not run", ".ci/run": "itself",
}  # fmt: skip
"""Programs that pages name and this does not run, and what does."""

MASKS = (
    # What differs from run to run: seconds, free disk, memory, the size of pages, which plotly's version decides; and
    # from one processor to another: which other orders of summing happen to give the same bits.
    (r"\d+(\.\d+)? s\b", "# s"),
    (r"\d+(\.\d+)? s each", "# s each"),
    (r"of \d+(\.\d+)? \w+ free", "of # free"),
    (r"about \d+(\.\d+)? [KMG]iB$", "about #"),
    (r"\d+(\.\d+)? [KMG]iB at most", "# at most"),
    (r"\.html, \d+(\.\d+)? [KMG]iB", ".html, #"),
    (r"^the same bits, in the first module, as by .+", "the same bits, in the first module, as by #"),
)
MEASURED = re.compile(
    r"(?<![\w.,-])-?\d+\.\d+(?:e[+-]?\d+)?(?![\w.])|(?<![\w.,])\d{4,}(?![\w.,])|(?<![\w.])\d+e[+-]?\d+(?!\w)"
)
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    title: str
    body: str
    under: bool  # right under the block before it


class Said(NamedTuple):
    """A command or snippet that a page shows, what the page has it print, and what it printed."""

    what: str
    shown: str
    printed: str

    @property
    def true(self) -> bool:
        return alike(self.shown.splitlines(), self.printed.splitlines())


def blocks(page: str) -> list[Block]:
    found, end = [], 0
    for fence in FENCE.finditer(page):
        found.append(Block(fence[1], fence[2] or "", fence[3], not page[end : fence.start()].strip()))
        end = fence.end()
    return found


def commands(body: str) -> list[tuple[str, str]]:
    """Of a console block: each command and the lines under it."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)
    assert not parts[0], f"a console block begins with a command: {parts[0]!r}"
    found = []
    for part in parts[1:]:
        command, _, shown = part.replace("\\\n", " ").partition("\n")
        found.append((command, shown))
    return found


def run(page: str, known: Mapping[str, str]) -> Iterator[Said]:
    """In the current folder; stops nowhere, so that all that is untrue is seen at once.

    known: what commands printed that were run before, and are not run again."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, code = "", 0
    for block in blocks(page):
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.body)
        elif block.language == "python":
            printed = _python(block.body, names)
        elif block.language == "text" and block.under:
            yield Said("the snippet above", block.body, printed)
        elif block.language == "console":
            for command, shown in commands(block.body):
                if command == "echo $?":
                    yield Said(command, shown, f"{code}\n")
                    continue
                code, printed = (0, known[command]) if command in known else d2surgery(command)
                yield Said(command, shown, printed)
        elif block.language == "sh":
            for line in block.body.replace("\\\n", " ").splitlines():
                yield from _line(line)


def _line(line: str) -> Iterator[Said]:
    words = shlex.split(line, comments=True)
    if words and words[0] == "d2surgery":
        code, printed = d2surgery(shlex.join(words))
        yield Said(line, "exit code 0", f"exit code {code}" + (f"\n{printed}" if code else ""))
    elif words:
        program = words[0].removeprefix(".venv/bin/")
        yield Said(
            line, "", "" if program in ELSEWHERE else f"{program} is in no list of programs that are run elsewhere"
        )


def d2surgery(command: str) -> tuple[int, str]:
    """The exit code and both streams of `d2surgery …`, in this process."""
    program, *arguments = shlex.split(command)
    if program != "d2surgery":
        return 127, f"{program}: only d2surgery is run here\n"
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        code = main(arguments)
    return code, stream.getvalue()


def _python(code: str, names: dict[str, Any]) -> str:
    """Warnings are errors."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, "<page>", "exec"), names)
    return stream.getvalue()


def alike(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Line by line, masked; `…` alone stands for any lines."""
    parts: list[list[str]] = [[]]
    for line in map(masked, shown):
        if line.strip() == "…":
            parts.append([])
        else:
            parts[-1].append(line)
    rest = list(map(masked, printed))
    first, *others = parts
    if not same(rest[: len(first)], first) or (not others and len(rest) != len(first)):
        return False
    rest = rest[len(first) :]
    for at, part in enumerate(others):
        last = at == len(others) - 1
        starts = range(len(rest) - len(part) + 1)
        found = next((s for s in (reversed(starts) if last else starts) if same(rest[s : s + len(part)], part)), None)
        if found is None or (last and part and found + len(part) != len(rest)):
            return False
        rest = rest[found + len(part) :]
    return True


def same(printed: Sequence[str], shown: Sequence[str]) -> bool:
    """Word by word; numbers that another processor rounds otherwise by 1 % or a unit of the last digit shown. Counts
    below a thousand are exact."""
    if len(printed) != len(shown):
        return False
    for one, other in zip(printed, shown, strict=True):
        (words, numbers), (right, wanted) = apart(one), apart(other)
        if words != right or not all(map(near, numbers, wanted)):
            return False
    return True


def apart(line: str) -> tuple[str, list[str]]:
    """A line without its measured numbers and how far they are moved by their widths, and these."""
    return re.sub(r" +", " ", MEASURED.sub("#", line)), MEASURED.findall(line)


def near(number: str, wanted: str) -> bool:
    digits = len(wanted.partition("e")[0].partition(".")[2])
    unit = float(f"1e{-digits}") * float(f"1e{wanted.partition('e')[2] or 0}")
    return abs(float(number) - float(wanted)) <= 1.0001 * max(unit, 0.01 * abs(float(wanted)))


def masked(line: str) -> str:
    for pattern, word in MASKS:
        line = re.sub(pattern, word, line)
    return line.rstrip()


def filled(page: str, said: Sequence[Said]) -> str:
    """The page with what was printed where that is not what it shows."""
    for one in said:
        if not one.true and one.what.startswith("d2surgery"):
            page = page.replace(f"$ {one.what}\n{one.shown}", f"$ {one.what}\n{one.printed}", 1)
    return page


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """That folder, and a terminal of 120 columns without colours."""
    before, here = dict(os.environ), Path.cwd()
    os.environ |= {"COLUMNS": "120", "NO_COLOR": "1"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
