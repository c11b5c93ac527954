"""The README, the site's pages and the notebooks: what they show is what happens, and every page is found.

`python tests/test_site.py [PAGE …]` writes what the commands print now into the pages; look at the difference."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import click
import pages
import pytest

import d2surgery
from d2surgery.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
WITH_EXAMPLES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "```" in page.read_text())]
DEMO = "d2surgery demo --out demo"
TRAINING = {"training.ipynb"}  # run by .ci/docs: it trains four adapters


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What pages show ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_what_pages_and_notebooks_show_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, so that the demo is made once: each page and notebook has a copy of it and nothing else."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    made, known = demo(tmp_path)
    untrue = []
    for page in WITH_EXAMPLES:
        if not any(block.language in ("console", "sh", "python") for block in pages.blocks(page.read_text())):
            continue
        with pages.inside(beside(made, tmp_path / page.stem)):
            untrue += [(name(page), *said) for said in pages.run(page.read_text(), known) if not said.true]
    for notebook in NOTEBOOKS:
        if notebook.name not in TRAINING:
            with pages.inside(beside(made, tmp_path / notebook.stem)), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(script(notebook), notebook.name, "exec"), {"__name__": "__main__"})
    for where, what, shown, printed in untrue:
        print(f"{where}: {what}\n--- the page\n{shown}\n--- what happens\n{printed}")
    assert [untrue_one[:2] for untrue_one in untrue] == []


def demo(folder: Path) -> tuple[Path, dict[str, str]]:
    """What `d2surgery demo --out demo` leaves, and what it prints.

    But for the report of the four, half of its time: `.ci/run` runs the demo whole, and pages here make reports."""
    with pages.inside(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2surgery.cli.example._report", lambda *_, **__: iter(["report of the four"]))
        code, printed = pages.d2surgery(DEMO)
    assert code == 0, printed
    return folder / "demo", {DEMO: printed}


def beside(made: Path, folder: Path) -> Path:
    """A folder with the demo, and with what pages call a reader's own: `my-adapter` is its DoRA, `model` its base.

    Links: whatever is written over a file is a file of its own."""
    for name, source in {"demo": made, "my-adapter": made / "dora", "model": made / "base"}.items():
        shutil.copytree(source, folder / name, copy_function=os.link)
    return folder


def script(notebook: Path) -> str:
    """Its cells of code as one script."""
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs_and_compiles(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    compile(script(notebook), notebook.name, "exec")
    assert notebook.stat().st_size < 30_000


# What a page may show: the runner -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "true"),
    [
        ("a\nb", "a\nb", True),
        ("a\nb", "a\nc", False),
        ("a", "a\nb", False),
        ("a\n…", "a\nb\nc", True),
        ("a\n  …\nd", "a\nb\nc\nd", True),
        ("a\n…\nd", "a\nb\nd\ne", False),
        ("…\nb\n…\nd", "a\nb\nd\nb\nd", True),
        ("a\n…\nc\n…", "a\nb\nd", False),
        ("took 0.4 s, 240.2 MiB at most", "took 12.1 s, 1.1 GiB at most", True),
        ("wrote page.html, 5.0 MiB", "wrote page.html, 4.9 MiB", True),
        ("error 41.6%", "error 41.7%", True),
        ("error 41.6%", "error 42.7%", False),
        ("28 modules", "29 modules", False),
        ("51702 of 65536 differ", "51690 of 65536 differ", True),
        ("51702 of 65536 differ", "41702 of 65536 differ", False),
        ("bf16 1.0, 0.07771  …", "bf16 0.9996, 0.07775 …", True),
        ("strength 0.8027 ± 0.002", "strength 0.8027 ± 0.004", False),
        ("", "a", False),
    ],
)
def test_lines_are_alike_but_for_what_differs_from_run_to_run(shown: str, printed: str, true: bool) -> None:
    assert pages.alike(shown.splitlines(), printed.splitlines()) is true


def test_the_runner_sees_what_is_untrue(tmp_path: Path) -> None:
    page = """
```sh
d2surgery explain entropy_rank  # fine
d2surgery explain NOTHING_OF_THE_KIND
rm -rf /
pip install .
```
```console
$ d2surgery explain MISSING_HALF
something else
$ echo $?
1
$ ls
```
```python
print(1)
```
```text
2
```
"""
    with pages.inside(tmp_path):
        found = [said.what for said in pages.run(page, {}) if not said.true]
    assert [what.split("  #")[0] for what in found] == [
        "d2surgery explain NOTHING_OF_THE_KIND", "rm -rf /", "d2surgery explain MISSING_HALF", "echo $?", "ls",
        "the snippet above",
    ]  # fmt: skip


# The site -------------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_contents_and_every_entry_is_a_page() -> None:
    """Without mkdocs, which .ci/docs runs: what stands behind `nav` in mkdocs.yml."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_verb_has_its_section_with_a_command() -> None:
    text = "\n".join(page.read_text() for page in sorted((DOCS / "verbs").glob("*.md")))
    sections = dict(re.findall(r"^## ([\w]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(VERBS)
    assert [verb for verb, section in sections.items() if f"d2surgery {verb}" not in section] == []


def test_every_option_that_a_page_names_is_one() -> None:
    known = {
        option
        for verb in VERBS
        for parameter in command(verb).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "--debug", "--version"}
    cited = {
        (name(page), option)
        for page in [ROOT / "README.md", *DOCS.rglob("*.md")]
        for code in re.findall(r"`([^`\n]*)`", re.sub(pages.FENCE, "", page.read_text()))
        if code.startswith(("--", "d2surgery", *VERBS))
        for option in re.findall(r"(?:^| )(--[a-z][\w-]*)", code)
    }
    assert len(cited) > 50
    assert [cite for cite in cited if cite[1] not in known] == []


def command(verb: str) -> click.Command:
    found: click.Command = import_module(f"d2surgery.cli.{verb}").command
    return found


def test_the_reference_has_every_public_name_where_it_is_defined() -> None:
    listed = re.findall(r"^::: d2surgery\.(.+)\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert {name: module for module, name in listed} == d2surgery._PUBLIC
    assert len(listed) == len(d2surgery._PUBLIC)


def test_the_start_is_five_commands_that_end_at_a_report() -> None:
    first = next(block for block in pages.blocks((DOCS / "index.md").read_text()) if block.language == "sh")
    commands = first.body.splitlines()
    assert len(commands) == 5
    assert [line.split()[:2] for line in commands[2:4]] == [["d2surgery", "inspect"], ["d2surgery", "report"]]
    assert commands[4].endswith(commands[3].split()[-1])


def test_pictures_are_small_and_each_is_shown() -> None:
    pictures = sorted((DOCS / "images").iterdir())
    texts = "".join(page.read_text() for page in [ROOT / "README.md", *DOCS.rglob("*.md")])
    assert len(pictures) <= 6
    assert [path.name for path in pictures if path.stat().st_size > 150_000 or path.name not in texts] == []


if __name__ == "__main__":
    wanted = [Path(page).resolve() for page in sys.argv[1:]] or WITH_EXAMPLES
    with tempfile.TemporaryDirectory() as work:
        made, known = demo(Path(work))
        for page in wanted:
            with pages.inside(beside(made, Path(work) / page.stem)):
                page.write_text(pages.filled(page.read_text(), list(pages.run(page.read_text(), known))))
