"""When the base in the adapter's config and the one given are clearly different models."""

from pathlib import Path

import pytest

from d2surgery.placement.bases import other_base

CASES = [  # (in the adapter's config, _name_or_path, directory, whether that is another base)
    ("meta-llama/Llama-3.1-8B", "", "Llama-3.1-8B-Instruct", True),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "base", True),
    ("unsloth/llama-3.1-8b-bnb-4bit", "", "Meta-Llama-3.1-8B", False),
    ("unsloth/llama-3.1-8b-bnb-4bit", "", "models--meta-llama--Llama-3.1-8B/snapshots/abc", False),
    ("Qwen/Qwen2.5-7B", "", "models--Qwen--Qwen2.5-14B/snapshots/abc", True),
    ("meta-llama/Llama-3.1-8B", "somewhere/else-8b", "Llama-3.1-8B", False),  # one of its names is right
    ("org/base", "", "Llama-3.1-8B", False),  # no name of a model
    ("/home/me/outputs/run", "", "Llama-3.1-8B", False),
    ("meta-llama/Llama-3.1-8B", "", "model", False),
    (None, "", "Llama-3.1-8B", False),
]


@pytest.mark.parametrize(("named", "called", "directory", "another"), CASES)
def test_another_base_is_said_where_both_names_are_known(
    tmp_path: Path, named: str | None, called: str, directory: str, another: bool
) -> None:
    target = tmp_path / directory
    target.mkdir(parents=True)
    found = list(other_base(named, target, {"_name_or_path": called}))
    assert [(problem.code, problem.severity) for problem in found] == [("OTHER_BASE_NAMED", "warning")] * another
