"""Where a run is reported to, by Trainer's own callbacks: TensorBoard, Weights & Biases and the others it knows."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from d2surgery.errors import Problem, raise_errors, refuse

_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}  # where they are not the reporter's name


def check_reporters(names: Sequence[str]) -> None:
    """Raises BAD_CONFIG with every name that Trainer does not know or that is not installed or set up."""
    if names:
        raise_errors(problem for name in names for problem in _misfits(name))


@contextmanager
def failures_named(names: Sequence[str]) -> Iterator[None]:
    """A reporter's own exception, as W&B's without a key or a network, becomes REPORTER_FAILED."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in names:
            raise
        raise refuse("REPORTER_FAILED", _first_line(error), module="run.report_to", got=package) from None


def _misfits(name: str) -> Iterator[Problem]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    bad = partial(Problem, code="BAD_CONFIG", module="run.report_to")
    package = _PACKAGES.get(name, name)
    if name not in INTEGRATION_TO_CALLBACK:
        yield bad(message="Trainer has no such reporter", wanted=" or ".join(INTEGRATION_TO_CALLBACK), got=name)
    elif importlib.util.find_spec(package) is None:
        yield bad(message=f"{name} is not installed", wanted=f"the package {package}, or no {name} in report_to")
    else:
        try:
            INTEGRATION_TO_CALLBACK[name]()  # as Trainer will; some look for a version or a setting
        except (RuntimeError, ImportError) as error:
            yield bad(message=_first_line(error), got=name)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
