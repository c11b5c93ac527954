"""The report: words, tables and figures in one page, and the page in a real browser."""

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from measuring import RANK, write_adapter, write_base

from d2surgery import D2SurgeryError
from d2surgery.reporting.tidy import COLUMNS
from d2surgery.verbs import reporting

KINDS = ("lora", "dora", "duallora", "d2lora")
HOSTILE = [
    "layers.0.<img src=x onerror=alert(1)>",
    "layers.1.</script><script>alert(2)</script>",
    'layers.2."><b onmouseover="alert(3)">',
    "layers.3.<!--body--><!--plotly-->",
    "layers.4.%{y}<a href='javascript:alert(5)'>x</a>",
    "layers.5.\u202eevil\x1b[31m",
]


def report(adapters: Sequence[str], **choices: Any) -> str:
    return reporting.report(*adapters, **choices).html


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, an adapter of each kind, and `again`, a second LoRA."""
    work = tmp_path_factory.mktemp("report")
    write_base(work / "base", layers=6)
    for kind in KINDS:
        write_adapter(work / kind, kind, layers=6)
    write_adapter(work / "again", seed=9, layers=6)
    write_adapter(work / "hostile", layers=3, names=HOSTILE)
    return work


@pytest.fixture(scope="module")
def four(work: Path) -> str:
    return report([str(work / kind) for kind in KINDS], base=work / "base", with_intruders=True)


@pytest.fixture(scope="module")
def hostile(work: Path) -> str:
    return report([str(work / "hostile"), str(work / "hostile")])


class Page(HTMLParser):
    """Tags with their attributes, and the text of each table row."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside):
            self.text += data
            if self.rows and {"td", "th"} & set(self.inside):
                self.rows[-1][-1] += data


# Without a browser ----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(four: str) -> None:
    page = Page(four)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert (attributes.get("href") or "data:").startswith(("data:", "#"))  # "#" stays on the page
    assert "default-src 'none'" in four
    assert four.count("<!--") == 0 or "<!--body-->" not in four
    assert sum(tag == "script" and not attributes for tag, attributes in page.tags) == 2  # plotly.js once, and ours


def test_it_says_what_they_are_and_what_stands_out(four: str) -> None:
    text = " ".join(Page(four).text.split())
    assert "A LoRA adapter, a DoRA adapter, a Dual LoRA adapter and a D2-LoRA adapter for org/base" in text
    parts = ["What stands out", "To each other", "Size:", "Rank:", "Depth:", "Length:", "Intruders:", "Coverage:"]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert "24 tensors in the file, 24 accounted for in 12 adapted modules" in text
    assert "this kind has no nominal rank" in text
    assert places[-1] < text.find("Rank used, by layer") < text.find("Every module")


def test_every_module_of_every_adapter_is_in_the_table(four: str) -> None:
    rows = Page(four).rows
    heads = next(row for row in rows if row[0] == "module")
    cells = [dict(zip(heads, row, strict=True)) for row in rows if row[0].startswith("model.layers.")]
    assert len(cells) == 4 * 12
    assert {cell["adapter"] for cell in cells} == set(KINDS)
    assert {cell["rank"] for cell in cells if cell["adapter"] == "lora"} == {str(RANK)}
    assert {cell["rank"] for cell in cells if cell["adapter"] == "duallora"} == {"–"}
    assert {cell["layer"] for cell in cells} == set("012345")
    assert all(cell["update"].endswith(" %") for cell in cells)


def test_a_layer_that_is_larger_and_one_that_does_nothing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = write_adapter(tmp_path / "a", layers=8) / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if ".layers.5." in key and "lora_B" in key:
            tensors[key] *= 20
        if ".layers.2.mlp" in key and "lora_B" in key:
            tensors[key] *= 0
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    save_file(tensors, file, metadata=header["__metadata__"])
    text = " ".join(Page(report([str(tmp_path / "a")])).text.split())
    assert "1 module of 16 do nothing (zero delta), model.layers.2.mlp.down_proj the first" in text
    assert re.search(r"Strongest: model\.layers\.5\.", text)
    assert re.search(r"stand out in size: .*layer 5 \(\d+ times the median\)", text)


def test_names_from_the_file_are_never_markup(hostile: str) -> None:
    page = Page(hostile)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert {"img", "b"} & {tag for tag, attributes in page.tags if attributes} == set()
    assert sum(tag == "script" and not attributes for tag, attributes in page.tags) == 2
    for name in HOSTILE[:5]:
        assert name in page.text
    assert "\u202e" not in hostile
    assert "\x1b" not in hostile


def test_the_same_inputs_give_the_same_page_without_paths_or_times(
    work: Path, hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    first, second = (report(["lora", "again"], base="base") for _ in range(2))
    assert first == second
    assert str(work) not in first
    assert hostile == report([str(work / "hostile"), str(work / "hostile")])


def test_figures_bring_their_numbers(four: str) -> None:
    import base64

    links = [a for tag, a in Page(four).tags if tag == "a" and "download" in a]
    assert len(links) > 30
    for link in links:
        text = base64.b64decode(str(link["href"]).partition("base64,")[2]).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        assert rows
        assert tuple(rows[0]) == COLUMNS


def test_two_adapters_without_a_common_module_have_a_page(work: Path) -> None:
    text = Page(report([str(work / "lora"), str(work / "hostile")])).text
    assert "have no module in common" in text


def test_an_adapter_that_does_not_fit_the_base_is_refused(work: Path) -> None:
    with pytest.raises(D2SurgeryError) as error:
        report([str(work / "hostile")], base=work / "base")
    assert {problem.code for problem in error.value.problems} == {"NO_SUCH_MODULE"}


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'd2surgery[browser]'")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """A page after its figures are drawn, and all it complained about or asked for."""

    def __init__(self, browser: Any, html: str, folder: Path, *, width: int = 1280, scheme: str = "light") -> None:
        file = folder / "page.html"
        file.write_text(html, encoding="utf-8")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))  # and then it waits for ever
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-drawn]", timeout=60_000)
        self.requests = [url for url in self.requests if not url.startswith((file.as_uri(), "blob:", "data:"))]

    def hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def js(self, code: str) -> Any:
        return self.page.evaluate(code)


@pytest.fixture(scope="module")
def seen(chromium: Any, four: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(chromium, four, tmp_path_factory.mktemp("seen"))


def test_it_loads_without_complaint_and_draws_every_figure(seen: Seen) -> None:
    assert (seen.complaints, seen.requests) == ([], [])
    drawn = seen.js(
        "[...document.querySelectorAll('.canvas')].map(at => [at.id, at.querySelectorAll('svg.main-svg').length,"
        " at.querySelectorAll('svg .trace path, svg .hm image, svg .scatterlayer path').length,"
        " at.querySelectorAll('svg .xtitle, svg .annotation').length])"
    )
    assert len(drawn) > 30
    assert all(svg > 0 and marks > 0 and words > 0 for _, svg, marks, words in drawn), drawn


def test_a_heading_sorts_by_mouse_and_by_keyboard(seen: Seen) -> None:
    def column(number: int) -> list[float]:
        values: list[float] = seen.js(
            f"[...document.querySelectorAll('.tall tbody tr')].map(r => Number(r.cells[{number}].dataset.v))"
        )
        return values

    heads = seen.js("[...document.querySelectorAll('.tall th')].map(h => h.textContent)")
    at = heads.index("σ₁")
    button = seen.page.locator(".tall th button").nth(at)
    button.click()
    assert column(at) == sorted(column(at), reverse=True)
    assert seen.js(f"document.querySelectorAll('.tall th')[{at}].ariaSort") == "descending"
    button.focus()
    seen.page.keyboard.press("Enter")
    assert column(at) == sorted(column(at))
    assert seen.js("document.querySelectorAll('.tall th[aria-sort]').length") == 1
    rank = heads.index("rank")
    for order in (["8"] * 12 + ["4"] * 24, ["4"] * 24 + ["8"] * 12):
        seen.page.locator(".tall th button").nth(rank).click()
        shown = seen.js(f"[...document.querySelectorAll('.tall tbody tr')].map(r => r.cells[{rank}].textContent)")
        assert shown == [*order, *["–"] * 12]  # what is missing stands last, either way
    seen.page.locator(".tall th button").first.click()
    names = seen.js("[...document.querySelectorAll('.tall tbody tr')].map(r => r.cells[0].textContent)")
    assert names == sorted(names)


@pytest.mark.parametrize("which", ["four", "hostile"])
def test_a_phone_needs_no_sideways_scrolling(
    chromium: Any, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seen = Seen(chromium, request.getfixturevalue(which), tmp_path, width=390)
    assert seen.js("document.documentElement.scrollWidth") <= 390
    assert seen.complaints == []


def test_it_follows_the_dark_scheme_and_prints_light(chromium: Any, hostile: str, tmp_path: Path) -> None:
    seen = Seen(chromium, hostile, tmp_path, scheme="dark")
    paper = "document.querySelector('.canvas').layout.paper_bgcolor"
    assert seen.js("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 26)"
    assert seen.js(paper) == "#11151a"
    seen.js("dispatchEvent(new Event('beforeprint'))")
    assert seen.js(paper) == "#ffffff"
    seen.js("dispatchEvent(new Event('afterprint'))")
    assert seen.js(paper) == "#11151a"


def test_hostile_names_run_nothing(chromium: Any, hostile: str, tmp_path: Path) -> None:
    seen = Seen(chromium, hostile, tmp_path)
    assert seen.complaints == []
    assert seen.js("document.querySelectorAll('main img, main a[href^=javascript], svg a').length") == 0
    assert "<img src=x onerror=alert(1)>" in seen.js(
        "document.querySelector('.canvas').textContent + document.body.innerText"
    )


# Real adapters --------------------------------------------------------------------------------------------------------


def test_published_adapters_and_their_likeness(published: Path) -> None:
    names = [f"gemma270m-aowei{end}" for end in ("", "-stage1")]
    text = " ".join(Page(report([str(published / name) for name in names])).text.split())
    assert "Two LoRA adapters for gemma3-270m-it" in text
    assert "are nearly the same" in text
    assert "72 modules" in text


# What it is a page of -------------------------------------------------------------------------------------------------


def test_a_page_says_its_version_its_date_and_the_files_by_hash(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.chdir(work)
    page = report(["lora", "again"], base="base")
    assert f"Made by d2surgery {version('d2surgery')} on 2023-11-14 (UTC)." in page
    for name in ("lora", "again"):
        weights = work / name / "adapter_model.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() in page


def test_a_page_has_a_list_of_its_sections_that_leads_to_each(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    page = report(["lora"])
    (contents,) = re.findall(r'<nav aria-label="Contents">(.*?)</nav>', page)
    listed = re.findall(r'<a href="#(section\d+)">(.*?)</a>', contents)
    assert re.findall(r'<h2 id="(section\d+)">(.*?)</h2>', page) == listed
    assert "<h2>" not in page
    assert "Every module" in [title for _, title in listed]


def test_no_number_stands_apart_from_its_unit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    page = report(["lora", "again"], base="base")
    prose = re.findall(r"<(p|li|figcaption)\b[^>]*>(.*?)</\1>", page, re.DOTALL)
    assert any("\u00a0%" in text for _, text in prose)
    assert not any(re.search(r"\d [%±]|± \d", text) for _, text in prose)
    assert "overflow-wrap: anywhere; }\nh1" not in page
    assert not re.search(r"\d\.<wbr>\d", page)  # 1.5 MB in a cell; a module's name breaks at its dots
    assert re.search(r"model\.<wbr>layers", page)
