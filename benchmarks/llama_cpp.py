"""Whether llama.cpp continues text with the tokens of transformers, for exports of each form.

    python benchmarks/llama_cpp.py MODEL --source llama.cpp --build llama.cpp/build [--out benchmarks/results]

Source and build are those of llama.cpp (static libraries, without OpenMP: -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF).
Each export goes through its converter in float32; both continue the same prompt tokens greedily. Where the converter
does not know the vocabulary for widths by layer, one line of it is changed, and the result says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, footer, started, table, write

COUNT = 32
PROMPTS = ("Once upon a time", "The capital of France is", "Water boils at")
LINE = ("self._set_vocab_llama_hf()", "self._set_vocab_gpt2()")


def cases(width: int) -> dict[str, tuple[Callable[[Any], Any] | None, dict[str, Any]]]:
    """(method for a model, how it is exported) by name."""
    import ffnkit as fk
    from ffnkit.methods import get
    from ffnkit.model.finding import ffns

    def ragged(model: Any) -> Any:
        widths = {ffn.name: ffn.width // 4 * (1 + number % 4) for number, ffn in enumerate(ffns(model))}
        return get("magnitude")(width=widths)

    return {
        "base": (None, {}),
        "equal widths": (lambda model: get("magnitude")(width=width * 3 // 4), {}),
        "merged": (lambda model: fk.Merging(groups=[["0", "1"]]), {}),
        "ragged, padded": (ragged, {}),
        "ragged, nemotron-nas, 256": (ragged, {"target": "nemotron-nas", "multiple": 256}),
    }


def converted(source: Path, export: Path, to: Path) -> str:
    """Convert an export, and say by which converter."""
    script = source / "convert_hf_to_gguf.py"
    done = subprocess.run([sys.executable, str(script), str(export), "--outfile", str(to), "--outtype", "f32"])
    if done.returncode == 0:
        return "as it is"
    with tempfile.TemporaryDirectory() as folder:
        for part in ("conversion", "gguf-py"):
            shutil.copytree(source / part, Path(folder) / part)
        shutil.copy(script, folder)
        changed = Path(folder) / "conversion" / "deci.py"
        changed.write_text(changed.read_text().replace(*LINE))
        again = [sys.executable, f"{folder}/{script.name}", str(export), "--outfile", str(to), "--outtype", "f32"]
        subprocess.run(again, check=True)
    return "one line changed"


def continued(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers continues prompts with."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    found = []
    for ids in prompts:
        given = torch.tensor([ids])
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=COUNT, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found


def compared(model: str, source: Path, driver: Path) -> list[dict[str, Any]]:
    """A row for each form and prompt."""
    from transformers import AutoTokenizer

    import ffnkit as fk
    from ffnkit.model.finding import ffns

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    rows = []
    for name, (method, how) in cases(ffns(fk.load(model))[0].width).items():
        edited = fk.load(model)
        if method is not None:
            fk.apply(edited, fk.plan(edited, method(edited)))
        with tempfile.TemporaryDirectory() as temporary:
            folder, file = Path(temporary) / "out", Path(temporary) / "out.gguf"
            fk.export(edited, folder, tokenizer=tokenizer, **how)
            converter = converted(source, folder, file)
            lines = "".join(" ".join(map(str, ids)) + "\n" for ids in prompts)
            run = subprocess.run([str(driver), str(file), str(COUNT)], input=lines, capture_output=True, text=True)
            theirs = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
            ours = continued(folder, prompts)
        for prompt, mine, other in zip(PROMPTS, ours, theirs, strict=True):
            row = {"form": name, "prompt": prompt, "converter": converter, "tokens": mine, "llama.cpp": other}
            rows.append(row | {"equal": mine == other})
            print(name, prompt, rows[-1]["equal"], flush=True)
    return rows


def built(source: Path, build: Path, folder: Path) -> Path:
    """The program that continues tokens."""
    libraries = ["src/libllama.a", *(f"ggml/src/libggml{part}.a" for part in ("", "-cpu", "-base"))]
    command = ["g++", "-O1", "-std=c++17", f"-I{source}/include", f"-I{source}/ggml/include"]
    command += [str(Path(__file__).with_name("greedy.cpp")), "-o", str(folder / "greedy")]
    subprocess.run([*command, *(str(build / each) for each in libraries), "-lpthread", "-ldl", "-lm"], check=True)
    return folder / "greedy"


def page(results: dict[str, Any]) -> str:
    """The table, and how it was taken."""
    lines = [["form", "converter", "prompts", "tokens", "continued alike"], ["---"] * 5]
    for form in dict.fromkeys(row["form"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["form"] == form]
        tokens = sum(len(row["tokens"]) for row in rows)
        alike = f"{sum(row['equal'] for row in rows)} of {len(rows)}"
        lines.append([form, rows[0]["converter"], str(len(rows)), str(tokens), alike])
    notes = [
        f"- {results['model']}, converted in float32, {results['source']}; greedy, at most {COUNT} tokens a prompt, "
        "from the tokens that transformers' tokenizer gives.",
        *footer(results, 1),
    ]
    return f"# llama.cpp beside transformers\n\n{table(lines)}\n\n" + "\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--named", default="llama.cpp", help="what the source is, for the page")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    name = Path(given.model).name
    with tempfile.TemporaryDirectory() as folder:
        driver = built(given.source, given.build, Path(folder))
        rows = compared(given.model, given.source.resolve(), driver)
    write(given.out, f"llama_cpp_{name}", started() | {"model": name, "source": given.named, "rows": rows}, page)


if __name__ == "__main__":
    main()
