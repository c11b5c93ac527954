"""An audit for other tools: JUnit XML for continuous integration, SARIF 2.1.0 for code scanning, the JSON Schema."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from typing import Any
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from d2surgery.auditing.findings import OPEN, Audit, ModuleAudit
from d2surgery.codes import CODES
from d2surgery.errors import Problem
from d2surgery.surveying.order import in_order

SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
LEVEL = {"error": "error", "warning": "warning", "info": "note"}


def schema() -> dict[str, Any]:
    """The JSON Schema of what `audit --json` prints."""
    text = files("d2surgery").joinpath("schemas", "audit.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


# JUnit ----------------------------------------------------------------------------------------------------------------


def junit(found: Audit) -> str:
    """One test case per adapted module, per tensor beside them, and per reason that is about neither.

    A failed check is a `failure`, an open question an `error`, what was not checked is `skipped`.
    """
    root = Element("testsuites")
    suite = SubElement(root, "testsuite", name="d2surgery audit", time=f"{found.seconds:.3f}")
    properties = SubElement(suite, "properties")
    for name in ("verdict", "base", "adapter", "merged"):
        SubElement(properties, "property", name=name, value=_plain(getattr(found, name)))
    suite.extend(_cases(found))
    places = {"tests": "", "failures": "/failure", "errors": "/error", "skipped": "/skipped"}
    suite.attrib.update({name: str(len(suite.findall(f"testcase{path}"))) for name, path in places.items()})
    indent(root)
    return tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _cases(found: Audit) -> Iterator[Element]:
    about = {problem.code: problem for problem in found.reasons}
    shown = set()
    for record in in_order(found.modules).values():
        shown.add(record.code)
        yield _module_case(record, about.get(record.code))
    for tensor in in_order(found.tensors).values():
        if tensor.modules:
            continue
        shown.add(tensor.code)
        case = Element("testcase", classname="tensors", name=_plain(tensor.name))
        if tensor.code:
            _outcome(case, tensor.code, f"{tensor.code}: {tensor.status}", about.get(tensor.code))
        yield case
    for problem in found.reasons:
        if problem.code not in shown:
            case = Element("testcase", classname="checks", name=problem.code)
            if problem.severity == "error" or problem.code in OPEN:
                _outcome(case, problem.code, str(problem), problem)
            yield case
    for item in found.not_checked:
        case = Element("testcase", classname="not checked", name=_plain(item))
        SubElement(case, "skipped", message="not checked")
        yield case


def _module_case(record: ModuleAudit, reason: Problem | None) -> Element:
    case = Element("testcase", classname="modules", name=_plain(record.module))
    said = f"{record.code}: {record.message}"
    if record.verdict != "pass":
        _outcome(case, record.code, said, reason, failed=record.verdict == "fail")
    elif record.code:
        SubElement(case, "system-out").text = _plain(said)
    return case


def _outcome(case: Element, code: str, message: str, reason: Problem | None, *, failed: bool | None = None) -> None:
    if failed is None:
        failed = code not in OPEN
    element = SubElement(case, "failure" if failed else "error", type=code, message=_plain(message))
    whole = f"\n{_plain(str(reason))}" if reason else ""
    element.text = f"{CODES[code].meaning}\n{CODES[code].remedy}{whole}"


def _plain(text: str) -> str:
    """XML has no form for control characters."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


# SARIF ----------------------------------------------------------------------------------------------------------------


def sarif(found: Audit) -> str:
    """A result per reason, with its rule; located in the merged directory, and at the module or tensor by name."""
    codes = list(dict.fromkeys(problem.code for problem in found.reasons))
    rules = [
        {"id": code, "shortDescription": {"text": CODES[code].meaning}, "help": {"text": CODES[code].remedy}}
        for code in codes
    ]
    driver = {"name": "d2surgery", "version": version("d2surgery"), "rules": rules}
    run = {
        "tool": {"driver": driver},
        "results": [_result(problem, codes.index(problem.code), found) for problem in found.reasons],
        "properties": {"verdict": found.verdict, "coverage": found.coverage, "notChecked": list(found.not_checked)},
    }
    return json.dumps({"$schema": SARIF, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _result(problem: Problem, rule: int, found: Audit) -> dict[str, Any]:
    modules = [name for name, record in found.modules.items() if record.code == problem.code]
    tensors = [name for name, t in found.tensors.items() if t.code == problem.code and not t.modules]
    named = modules or tensors or ([problem.module] if problem.module else [])
    kind = "module" if modules else "member"
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(found.merged)}}}
    if named:
        location["logicalLocations"] = [{"fullyQualifiedName": name, "kind": kind} for name in named]
    return {
        "ruleId": problem.code,
        "ruleIndex": rule,
        "level": LEVEL[problem.severity],
        "message": {"text": f"{problem}. {problem.remedy}"},
        "locations": [location],
    }


def _uri(path: str) -> str:
    return quote(path.replace("\\", "/"))
