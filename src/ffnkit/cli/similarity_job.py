"""The work behind ``ffnkit analyze --similarity``: which layers of a model do alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ffnkit.analysis.similarity import similarity
from ffnkit.cli import console
from ffnkit.cli.analyze_job import Texts
from ffnkit.io import files


def compare(name: str, texts: tuple[Any, ...], layers: str, device: Any, out: Path | None, as_json: bool) -> None:
    """Compare the layers of one model, print the matrices, write similarity.json and similarity.png."""
    source = Texts(*texts)
    console.quieten()
    models, tokenizer = source.open([name])
    first, second = source.batches(models[0].to(device), tokenizer)
    found = similarity(models[0], [*first, *second], layers=layers, tokens=source.tokens)
    report = {"name": name, **console.plain(found.to_dict())}
    if out is not None:
        with files.staging(out, keep_others=True) as temporary:
            text = json.dumps(report, indent=2, ensure_ascii=False)
            files.write_text(temporary / "similarity.json", text + "\n")
            found.plot(temporary / "similarity.png")
    if as_json:
        console.print_json(report)
    else:
        console.out(str(found))
        if out is not None:
            console.say(f"saved in {out}: similarity.json, similarity.png")
