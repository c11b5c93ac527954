"""The card beside an output: front matter that the hub reads, facts of the output itself, nothing of this machine."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from measuring import write_adapter, write_base

from d2surgery import About, D2SurgeryError, from_adapters, load, save
from d2surgery.cards import CARD, card, write_card
from d2surgery.cli import main


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "dora", "dora")
    write_adapter(tmp_path / "lora", "lora")
    return tmp_path


def matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def test_a_merge_has_a_card_that_the_hub_reads(work: Path) -> None:
    words = ["--base", str(work / "base"), "--adapter", str(work / "dora"), "--out", str(work / "out")]
    assert main(["merge", *words, "--strength", "0.5", "--dtype", "bf16", "--quiet"]) == 0
    text = (work / "out" / CARD).read_text(encoding="utf-8")
    assert matter(text) == {
        "base_model": "org/base", "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["merge", "d2surgery"],
    }  # fmt: skip
    assert "| strength | 0.5 |" in text
    assert "| dtype | BF16 |" in text
    assert "not run" in text
    assert str(work) not in text
    assert "| audit | pass |" in card(work / "out", verdict="pass")
    assert main(["audit", "--merged", str(work / "out"), "--receipt", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("words", "library"),
    [
        (["convert", "{dora}", "{out}", "--kind", "lora", "--base", "{base}", "--rank", "4"], "peft"),
        (["resize", "{lora}", "{out}", "--rank", "2"], "peft"),
        (["convert", "{dora}", "{out}", "--to", "mlx"], "d2surgery"),
        (["scale", "{lora}", "1", "--out", "{out}"], "peft"),
    ],
)
def test_what_surgery_writes_has_a_card(words: list[str], library: str, work: Path) -> None:
    given = [
        word.format(lora=work / "lora", dora=work / "dora", base=work / "base", out=work / "out") for word in words
    ]
    assert main([*given, "--quiet"]) == 0
    text = (work / "out" / CARD).read_text(encoding="utf-8")
    assert matter(text)["library_name"] == library
    assert "d2surgery" in matter(text)["tags"]
    assert str(work) not in text
    assert len(load(work / "out")) == 6


def test_a_card_that_is_there_stays(work: Path) -> None:
    (work / "dora" / CARD).write_text("mine")
    assert write_card(work / "dora").read_text() == "mine"


def test_a_base_that_is_no_hub_id_is_not_in_the_front_matter(work: Path) -> None:
    adapters = dict(load(work / "dora").items())
    for number, base in enumerate(["/home/me/model", "x\n---\nlicense: evil", "a|b<script>"]):
        save(from_adapters(adapters, About(base_model=base)), work / f"a{number}")
        text = card(work / f"a{number}")
        assert "base_model" not in matter(text)
        assert "license" not in matter(text)
        assert "/home/me" not in text
        assert "<script>" not in text


def test_what_is_no_output_has_no_card(work: Path) -> None:
    with pytest.raises(D2SurgeryError):
        card(work / "base")
    (work / "base" / "d2surgery_merge.json").write_text("{")
    with pytest.raises(D2SurgeryError, match="BAD_CONFIG"):
        card(work / "base")


# Push -----------------------------------------------------------------------------------------------------------------


class Hub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def call(**given: Any) -> str:
            if self.error is not None:
                raise self.error
            self.calls.append((name, given))
            return "https://hub/org/name"

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_push_makes_the_repository_and_uploads_with_a_card(
    work: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(work / "dora"), "org/name", "--private", "--revision", "v2"]) == 0
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "org/name", "exist_ok": True, "private": True}
    assert hub.calls[2][1]["folder_path"] == work / "dora"
    assert hub.calls[2][1]["revision"] == "v2"
    assert (work / "dora" / CARD).exists()
    assert "https://hub/org/name" in capsys.readouterr().out


def test_that_the_hub_is_not_there_is_said(work: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """In the error of whichever HTTP library, of which no class of huggingface_hub is a base."""
    hub.error = type("ConnectError", (Exception,), {})("Name or service not known")
    assert main(["push", str(work / "dora"), "org/name"]) == 2
    assert "PUSH_REFUSED org/name: Name or service not known" in capsys.readouterr().err


def test_what_the_hub_refuses_is_said(work: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.error = ValueError("Token is required\nto write")
    assert main(["push", str(work / "dora"), "org/name"]) == 2
    assert "PUSH_REFUSED org/name: Token is required to write" in (error := capsys.readouterr().err)
    assert "hf auth login" in error
    assert main(["push", str(work / "nothing"), "org/name"]) == 2
    assert "FILE_MISSING" in capsys.readouterr().err
    assert main(["push", str(work / "base"), "org/name"]) == 2
    assert "NOT_AN_ADAPTER" in capsys.readouterr().err
