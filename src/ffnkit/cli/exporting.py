"""``ffnkit export``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import typer

from ffnkit.cli import console, options
from ffnkit.cli.application import app
from ffnkit.cli.history import History
from ffnkit.cli.outputs import check_output
from ffnkit.io.folders import staging


@app.command(rich_help_panel="Models")
def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A compact checkpoint (any model will do).")],
    out: options.Out,
    target: Annotated[
        Literal["standard", "nemotron-nas"],
        typer.Option("--target", help="nemotron-nas: each layer's own width, for vLLM and others; LLaMA's shape only."),
    ] = "standard",
    multiple: Annotated[
        int, typer.Option("--multiple", min=1, help="Pad widths to multiples of it; 256 for SGLang and llama.cpp.")
    ] = 1,
    measure: Annotated[
        int | None,
        typer.Option(
            "--measure",
            min=0,
            help="Tokens over which speeds are compared; 0: not. \\[128 below 500 million parameters]",
        ),
    ] = None,
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Turn a compact checkpoint into one that opens without ffnkit: standard, for plain from_pretrained.

    The result is reloaded and its outputs are compared before it is put in place. The report says what opens it, what
    padding costs, and the tokens per second of it, of the original and of a model of equal size with equal widths.

    Widths that differ by layer are padded with zeros to the widest, so a standard checkpoint can be larger than a
    compact one. --target nemotron-nas writes each layer's own width (Llama, Mistral and Qwen2 models).

    [bold]Examples[/bold]

      ffnkit export tuned [cyan]--out final[/cyan]

      ffnkit export small-llama [cyan]--target nemotron-nas --multiple 256[/cyan] --out final
    """
    check_output(out, overwrite=overwrite, source=model)
    console.quieten()
    import ffnkit
    from ffnkit.checkpoint.speed import LARGEST, TOKENS
    from ffnkit.cli.forms import warn_export
    from ffnkit.io.architectures import load_any, load_companion
    from ffnkit.io.placing import mapped

    with mapped(device_map):
        loaded = load_any(model)
    history = History.of(model)
    warn_export(loaded, history, target)
    if measure is None:
        measure = TOKENS if sum(parameter.numel() for parameter in loaded.parameters()) < LARGEST else 0
    with staging(out) as temporary:
        result = ffnkit.export(
            loaded,
            temporary,
            tokenizer=load_companion(model),
            card=history.card(loaded, target, multiple),
            target=target,
            multiple=multiple,
            measure=measure,
            before={name: width for name, width, _ in history.layers},
        )
        history.write(temporary)
    result = replace(result, path=str(out))
    if as_json:
        console.print_json(result.to_dict())
    else:
        console.out(str(result))
