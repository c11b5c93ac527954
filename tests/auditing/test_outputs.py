"""What an audit prints and writes: JSON by its published schema, JUnit XML, SARIF, the page, and exit codes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from mutations import MODULES, NORM, OUT, Q, World, base_again, both, damaged, formula, nothing, strength, tensor

from d2surgery.auditing import audit
from d2surgery.auditing.findings import Audit
from d2surgery.cli import main
from d2surgery.evaluating.behaviour import compare_outputs, compare_scores
from d2surgery.evaluating.tasks import Score
from d2surgery.evaluating.traces import Layer
from d2surgery.reporting.audit_files import junit, sarif, schema
from d2surgery.reporting.figures.audit import STATES, output_errors
from d2surgery.reporting.pages.audit import audit_page
from d2surgery.verbs import reporting

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
GONE = "model.layers.0.input_layernorm.weight"
SECOND = [f"{m}.weight" for m in MODULES if ".1." in m]
CHANGES = {
    "healthy": nothing,
    "broken": both(
        formula(strength(1.5), [Q]),
        base_again(*SECOND),
        tensor(NORM, lambda t: 2 * t),
        tensor(GONE, lambda t: None),
    ),
    "scaled": formula(strength(3), [Q]),
    "open": damaged(f"{OUT}.weight", (slice(0, 8), 5), lambda t: t * 1.02),
}
Made = Mapping[str, tuple[Audit, list[str]]]


def report(adapters: Sequence[str], **choices: Any) -> str:
    return reporting.report(*adapters, **choices).html


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By name: an audit, and the arguments that name its inputs."""
    folder = tmp_path_factory.mktemp("outputs")
    setting = World(folder).setting("lora", "BF16")
    found = {}
    for name, change in CHANGES.items():
        out = folder / name
        out.mkdir()
        for file in setting.healthy.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        (out / "d2surgery_merge.json").unlink()
        change(setting, out)
        arguments = ["--base", str(setting.base), "--adapter", str(setting.adapter), "--merged", str(out)]
        found[name] = (audit(setting.base, setting.adapter, out), arguments)
    return found


def run(*arguments: str) -> int:
    return main(["audit", *arguments])


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_json_is_what_the_published_schema_says(made: Made, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*made[name][1], "--json")
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema()).validate(found)
    assert undeclared(found, schema()) == []


def undeclared(value: Any, rules: Mapping[str, Any], at: str = "") -> list[str]:
    """Fields of the document that the schema does not name."""
    if "$ref" in rules:
        rules = schema()["$defs"][rules["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, list):
        return sorted({name for item in value for name in undeclared(item, rules.get("items", {}), f"{at}[]")})
    if not isinstance(value, dict) or "properties" not in rules:
        return []
    own = [f"{at}.{name}" for name in value if name not in rules["properties"]]
    return own + [
        name
        for key, item in value.items()
        if key in rules["properties"]
        for name in undeclared(item, rules["properties"][key], f"{at}.{key}")
    ]


def test_the_schema_is_a_schema_and_goes_with_the_package() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert files("d2surgery").joinpath("schemas", "audit.schema.json").is_file()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema_version": 1, "verdict": "maybe"}, schema())


# JUnit and SARIF ------------------------------------------------------------------------------------------------------


def test_junit_has_a_case_per_module_and_tensor_and_a_failure_per_wrong_one(made: Made) -> None:
    found = made["broken"][0]
    suite = ElementTree.fromstring(junit(found)).find("testsuite")
    assert suite is not None
    cases = {(case.get("classname"), case.get("name")): case for case in suite.iter("testcase")}
    assert {name for kind, name in cases if kind == "modules"} == set(MODULES)
    failed = {name for (_, name), case in cases.items() if case.find("failure") is not None}
    assert {Q, NORM, GONE, *(name.removesuffix(".weight") for name in SECOND)} <= failed
    assert not {m for m in MODULES if ".0." in m and m != Q} & failed
    failure = cases["modules", Q].find("failure")
    assert failure is not None
    assert failure.get("type") == "WRONG_STRENGTH"
    assert "strength 1.5 ±" in (failure.get("message") or "")
    assert int(suite.get("tests", "")) == len(cases)
    assert int(suite.get("failures", "")) == len([case for case in cases.values() if case.find("failure") is not None])


def test_junit_of_a_pass_has_no_failure(made: Made) -> None:
    suite = ElementTree.fromstring(junit(made["healthy"][0])).find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert next(p.get("value") for p in suite.iter("property") if p.get("name") == "verdict") == "pass"


def test_sarif_has_a_result_with_its_rule_and_place_per_reason(made: Made) -> None:
    found = made["broken"][0]
    log = json.loads(sarif(found))
    assert log["version"] == "2.1.0"
    (run_,) = log["runs"]
    rules = run_["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert len(run_["results"]) == len(found.reasons)
    for result in run_["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    by_code = {result["ruleId"]: result for result in run_["results"]}
    named = [place["fullyQualifiedName"] for place in by_code["DELTA_NOT_APPLIED"]["locations"][0]["logicalLocations"]]
    assert set(named) == {name.removesuffix(".weight") for name in SECOND}


# The page -------------------------------------------------------------------------------------------------------------


def words(page: str) -> str:
    body = re.sub(r"<script.*?</script>|<style.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_page_of_a_broken_merge_says_what_is_wrong_and_where(made: Made) -> None:
    text = words(audit_page(made["broken"][0]))
    assert text.index("FAIL") < text.index("DELTA_NOT_APPLIED") < text.index("Layer by layer")
    assert "all 7 types of module of layer 1" in text
    for expected in (Q, "1.5", "TENSOR_MISSING", GONE, "TENSOR_CHANGED", NORM, "What to do"):
        assert expected in text


def test_the_page_of_a_pass_says_so_and_by_which_recipe(made: Made) -> None:
    found = made["healthy"][0]
    text = words(audit_page(found))
    assert text.index("PASS the merged checkpoint is the base with the adapter") < 200
    assert "14 adapted modules: 14 bit for bit by recipe" in text
    assert "none not as they should be" in text
    assert "Where to look first" not in text


def test_a_page_needs_nothing_from_outside_and_escapes_what_strangers_wrote(made: Made) -> None:
    found = replace(made["broken"][0], merged="<script>alert(1)</script>", not_checked=("<b>bold</b>",))
    page = audit_page(found)
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', own) == []  # "#" stays on the page


def test_what_is_wrong_stands_first_in_the_table(made: Made) -> None:
    found = made["broken"][0]
    table = audit_page(found).split("Every adapted module")[1].split("</table>")[0]
    wrong = sum(record.status == "wrong" for record in found.modules.values())
    assert 0 < wrong < len(found.modules)
    rows = table.split("<tr>")[2:]
    assert [STATES["wrong"][2] in words(row) for row in rows] == [at < wrong for at in range(len(rows))]


def _layer(module: str) -> Layer:
    return Layer(
        module=module, error=0.1, noise=0.1, served=0.1, effect=0.5, own_error=None, own_noise=None, own_effect=None
    )


def test_outputs_are_plotted_beside_the_number_of_their_layer() -> None:
    names = [f"model.layers.{at}.{name}" for at in (0, 1, 2) for name in ("q_proj", "v_proj")]
    layers = [_layer(name) for name in ("embed_tokens", *names)]
    axis = output_errors(layers).figure.layout.xaxis
    assert dict(zip(axis.ticktext, axis.tickvals, strict=True)) == {"0": 1, "1": 3, "2": 5}


def test_the_page_shows_what_the_models_say_and_the_first_module_that_deviates(made: Made) -> None:
    found, (_, base, _, adapter, _, merged) = made["scaled"]
    said = compare_outputs(base, adapter, merged)
    gap = compare_scores([_score(0, 1, 2, 3)], [_score(0, 1, 2, 0)])
    page = audit_page(replace(found, behaviour=said, task=gap))
    text = words(page)
    assert said.first_deviating == Q
    assert f"The first module whose output deviates by 2 times what a right merge's does is {Q} ." in text
    assert said.logits is not None
    assert f"{said.logits.kl_mean:.3g}" in text
    assert "changes accuracy by -25.00 points" in text
    assert "Outputs of the adapted modules" in text
    assert "What the merged model says" not in words(audit_page(found))


def _score(*picked: int) -> Score:
    """Of four questions whose answers are 0, 1, 2, 3."""
    return Score(task="four", by="likelihood", gold=(0, 1, 2, 3), picked=picked, chance=0.25)


def test_the_report_takes_up_the_audit(made: Made) -> None:
    _, (_, base, _, adapter, _, merged) = made["broken"]
    page = report([adapter], base=base, merged=merged)
    text = words(re.sub(r"<nav.*?</nav>", "", page, flags=re.DOTALL))  # without the list of sections
    assert "FAIL the merged checkpoint is not the base with the adapter" in text
    assert text.index("What stands out") < text.index("FAIL") < text.index("Every module")


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_every_form_and_exits_by_the_verdict(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {"html": tmp_path / "a.html", "junit": tmp_path / "a.xml", "sarif": tmp_path / "a.sarif"}
    options = [part for name, path in outputs.items() for part in (f"--{name}", str(path))]
    assert run(*made["broken"][1], *options) == 1
    assert capsys.readouterr().out.startswith("FAIL")
    assert "FAIL" in words(outputs["html"].read_text())
    assert ElementTree.parse(outputs["junit"]).getroot().tag == "testsuites"
    assert json.loads(outputs["sarif"].read_text())["runs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.sarif", "a.xml"]
    assert run(*made["healthy"][1], "--quiet") == 0
    assert capsys.readouterr().out.splitlines() == ["PASS"]


def test_a_folder_that_is_not_there_is_said_before_the_work(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*made["healthy"][1], "--junit", str(tmp_path / "none" / "a.xml")) == 2
    assert "FILE_MISSING" in capsys.readouterr().err


def test_a_report_with_merged_needs_a_base_and_one_adapter(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (_, base, _, adapter, _, merged) = made["healthy"]
    out = ["--merged", merged, "--out", str(tmp_path / "a.html")]
    assert main(["report", adapter, *out]) == 2
    assert main(["report", adapter, adapter, "--base", base, *out]) == 2
    assert capsys.readouterr().err.count("USAGE") == 2


def test_no_traceback_and_no_pass_where_nothing_can_be_audited(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (_, base, _, adapter, _, merged) = made["healthy"]
    for wrong in (tmp_path, tmp_path / "absent", Path(adapter)):
        assert run("--base", base, "--adapter", adapter, "--merged", str(wrong), "--json") == 2
        assert "error" in json.loads(capsys.readouterr().out)
    assert run("--base", base, "--adapter", merged, "--merged", merged) == 2
