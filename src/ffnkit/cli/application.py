"""The typer application: global options, and the commands in the order of the help."""

from __future__ import annotations

from typing import Annotated

import typer

from ffnkit.cli import console
from ffnkit.cli.group import Group

HELP = """
[bold]Narrower, shared and cheaply tuned FFN blocks[/bold] for unmodified Hugging Face models.

MODEL is a name on the hub or a folder that holds config.json, compact checkpoints of ffnkit included.

[bold]Start here[/bold]

  ffnkit run                                       the whole job on a small real model, a few minutes on a CPU
  ffnkit inspect roberta-base                      which FFNs a model has
  ffnkit compress roberta-base --method fusion --set width=0.25 --layers last:8 --out small
  ffnkit tune small --task sst2 --out tuned
  ffnkit export tuned --out final                  final opens with plain from_pretrained
"""

app = typer.Typer(
    name="ffnkit",
    cls=Group,
    help=HELP,
    rich_markup_mode="rich",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback(invoke_without_command=True)
def ffnkit(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr; results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="The libraries' own logs too.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model: trust its authors.")
    ] = False,
) -> None:
    console.state.debug, console.state.quiet, console.state.verbose = debug, quiet and not verbose, verbose
    if trust_remote_code:
        from ffnkit.io.loading import trust

        trust.given = True
    if version:
        from importlib.metadata import version as installed

        console.out(f"ffnkit {installed('ffnkit')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.out(context.get_help().rstrip())
    else:
        context.with_resource(console.progress(context.invoked_subcommand))
