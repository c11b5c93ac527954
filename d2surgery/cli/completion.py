"""`d2surgery completion`: what makes a shell complete verbs, options and paths, and the line that installs it."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from d2surgery.cli import output
from d2surgery.errors import refuse

VARIABLE = "_D2SURGERY_COMPLETE"
INSTALL = {
    "bash": """echo 'eval "$(d2surgery completion bash)"' >> ~/.bashrc""",
    "zsh": """echo 'eval "$(d2surgery completion zsh)"' >> ~/.zshrc""",
    "fish": "d2surgery completion fish > ~/.config/fish/completions/d2surgery.fish",
}


@click.command(name="completion")
@click.argument("shell", required=False, type=click.Choice(list(INSTALL)))
def command(shell: str | None) -> None:
    """Print the completion of a SHELL (bash, zsh, fish); without one, the line that installs it for each.

    It completes verbs, options, choices and paths. A new shell has it; `exec $SHELL` gives it to this one.
    """
    if shell is None:
        mine = Path(os.environ.get("SHELL", "")).name
        for name in sorted(INSTALL, key=lambda name: name != mine):
            output.emit(f"{name + ':':6}{INSTALL[name]}")
        return
    found = get_completion_class(shell)
    if found is None:
        raise refuse("USAGE", "this shell is not known to click", got=shell)
    click.echo(found(click.Group(), {}, "d2surgery", VARIABLE).source())
