"""For mkdocs: a link that leads out of docs/ has no page on the site, so the file is named instead; and the gallery's
live page, which is made when the site is built."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
_command = ""


def on_startup(command: str, **_: Any) -> None:
    global _command
    _command = command


def on_post_build(config: Any, **_: Any) -> None:
    if _command != "build":
        return
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            [sys.executable, "-m", "d2surgery", "demo", "--out", "demo"],
            cwd=work,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        live = Path(config["site_dir"]) / "live"
        live.mkdir()
        shutil.copy(Path(work) / "demo" / "report.html", live)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = (DOCS / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        path = (here / link[2].partition("#")[0]).resolve()
        return link[0] if path.is_relative_to(DOCS) else f"{link[1]} (`{path.relative_to(DOCS.parent)}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", named, markdown)
