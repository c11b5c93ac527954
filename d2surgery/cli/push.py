"""`d2surgery push`: an output to the Hugging Face hub, with its card."""

from pathlib import Path
from typing import Any

import click

from d2surgery.cards import CARD, write_card
from d2surgery.cli import output
from d2surgery.errors import refuse

_UNFINISHED = (".*", "*.partial", "optimizer*", "scheduler*", "rng_state*", "training_args.bin")


@click.command(name="push")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Where the repository is made: for you and your organisation only.")
@click.option("--revision", help="Branch to push to, made where it is not there. Default: main.")
@click.option("--message", default="Upload with d2surgery", show_default=True, help="Of the commit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
def command(
    directory: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """DIRECTORY, a merged model or an adapter, to the repository ORG/NAME of the hub, made where it is not there.

    Through huggingface_hub, with the token that `hf auth login` or HF_TOKEN gave. A card is written where none lies
    there. What trainers keep of their own state is left out.
    """
    if not directory.is_dir():
        raise refuse("FILE_MISSING", "no such directory", file=str(directory))
    write_card(directory)
    url = _upload(directory, repository, private=private, revision=revision, message=message)
    if as_json:
        output.emit_json({"directory": str(directory), "repository": repository, "url": url})
    elif not quiet:
        output.emit(f"{output.style('OK', 'green')}  {output.printable(str(directory))} is at {output.printable(url)}")
        output.emit(f"  card     {output.printable(str(directory / CARD))}")
    return 0


def _upload(directory: Path, repository: str, *, private: bool, revision: str | None, message: str) -> str:
    import huggingface_hub  # half a second, and only here

    hub = huggingface_hub.HfApi()
    choices: dict[str, Any] = {"repo_id": repository, "exist_ok": True}
    try:
        made = hub.create_repo(**choices, private=private or None)
        if revision is not None:
            hub.create_branch(repo_id=repository, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=directory, revision=revision, commit_message=message,
            ignore_patterns=list(_UNFINISHED),
        )  # fmt: skip
    except Exception as error:  # the hub's, the disk's, and those of whichever HTTP library huggingface_hub uses
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise refuse("PUSH_REFUSED", reason, file=repository) from None
    return str(made)
