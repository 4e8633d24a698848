"""What a run leaves on disk: one folder a unit, a marker a stage, fingerprints that tell what may be reused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffnkit.errors import FfnkitError
from ffnkit.io.files import read_json, write_text
from ffnkit.io.folders import check_target
from ffnkit.io.workspace import claimed
from ffnkit.recipe.schema import Arm, Recipe, arm_dict, facts_today
from ffnkit.recipe.sources import HUB_SET, calibration_texts, expand, method_of
from ffnkit.tune.settings import HARMLESS

FORMAT = 1  # of the folder; raised when an older one can no longer be continued
TRAINED = (
    *("trainable_parameters", "updated_parameters", "trainable_body", "trainable_share"),
    *("samples_per_second", "steps_per_second"),
)  # of a training's result, in the rows
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Unit:
    """One arm with one seed: its folder and the markers in it."""

    arm: str
    seed: int
    folder: Path

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.folder.parents[2]

    @property
    def name(self) -> str:
        """As shown to the user."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def work(self) -> Path:
        """What only an unfinished unit needs."""
        return self.folder / "work"

    def marker(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote, or None; a marker is written last and in one piece."""
        return read_json(self.folder / f"{stage}.json")

    def mark(self, stage: str, figures: dict[str, Any]) -> None:
        """Say that a stage is finished."""
        check_there(self.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{stage}.json", figures)

    def unmark(self, stage: str) -> None:
        """Take a marker away."""
        (self.folder / f"{stage}.json").unlink(missing_ok=True)

    @property
    def done(self) -> bool:
        """Whether every stage is finished."""
        return self.marker("done") is not None

    @property
    def error(self) -> str:
        """Why it failed; "" where it did not."""
        return str((self.marker("failed") or {}).get("error", ""))

    @property
    def begun(self) -> bool:
        """Whether something of it is on disk."""
        return self.marker("unit") is not None

    @property
    def over(self) -> bool:
        """Whether nobody will go on with it in this run: it is done, or it failed."""
        return self.done or self.marker("failed") is not None

    @contextmanager
    def held(self, wait: float = 15.0) -> Iterator[None]:
        """Hold the unit: a process that outlived its run, on this host or another, may still be at work on it.

        Args:
            wait: seconds until it is given up.

        Raises:
            FfnkitError: it is at work on it still.
        """
        check_there(self.out)
        place = self.folder.parent / f".{self.folder.name}"
        with claimed(place, f"running {self.name}", "another process is at work on it", wait=wait):
            try:
                yield
            finally:
                shutil.rmtree(place, ignore_errors=True)


def unit_of(out: Path, arm: str, seed: int) -> Unit:
    """The unit of an arm and a seed in ``out``."""
    return Unit(arm, seed, out / "units" / arm / f"seed-{seed}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


# ------------------------------------------------------------------------------------------- fingerprints
def digest(value: Any) -> str:
    """Sixteen hex digits of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(name: str | Path) -> str:
    """Of a file's content; of what is on the hub its name. Raises FfnkitError where it is not there."""
    if str(name).startswith(HUB_SET):
        return str(name)
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        found = (error.strerror or type(error).__name__).lower()
        raise FfnkitError(f"reading {name}", found, "Check the name of the file") from None


def folder_digest(folder: Path) -> str:
    """Of a model's folder: names and sizes of its files, the whole of small ones and both ends of large ones."""
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in {".json", ".txt", ".safetensors", ".bin", ".model"}:
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            content = hashlib.sha256(file.read(_SAMPLE))
            if size > _SAMPLE:
                file.seek(max(_SAMPLE, size - _SAMPLE))
                content.update(file.read(_SAMPLE))
        parts.append([path.name, size, content.hexdigest()])
    return digest(parts)


def base_facts(recipe: Recipe, model: str, data: str) -> dict[str, Any]:
    """What every unit depends on and changes its figures, by the field of the recipe that it comes from."""
    plain = recipe.to_dict()
    return {
        "format": FORMAT,
        "model": model,
        "tokenizer": recipe.tokenizer,
        "task": plain["task"],
        "limits": plain["limits"],
        "stages": [stage for stage in recipe.stages if stage not in ("heal", "distil", "prune", "recover")],
        "tune": {name: value for name, value in plain["tune"].items() if name not in HARMLESS},
        "generation": {name: value for name, value in plain["generation"].items() if name != "batch_size"},
        "evaluate_before": recipe.evaluate_before,
        "export": [recipe.export, recipe.export_seeds],
        "data": data,  # last: another limit is also other data, and the limit says more
    }


def unit_facts(recipe: Recipe, base: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """What the figures of one unit depend on."""
    chosen = recipe.arms[arm]
    facts: dict[str, Any] = {"arm": arm_dict(chosen), "tuner": recipe.tuner_of(arm).model_dump(), "seed": seed, **base}
    facts["arm"].pop("tuner", None)
    facts["calibration"] = calibration_facts(recipe) if measures(chosen) or prunes_by_data(chosen) else None
    facts["distil"] = distil_facts(recipe) if distilled(recipe, arm) else None
    if healed(recipe, arm):
        facts["heal"] = recipe.heal.model_dump(mode="json")
        facts["calibration"] = calibration_facts(recipe)
    if recipe.forgetting is not None:
        path = Path(expand(recipe.forgetting))
        facts["forgetting"] = [recipe.forgetting, file_digest(path)]
    if recipe.lm_eval is not None:
        facts["lm_eval"] = recipe.lm_eval.model_dump(mode="json", exclude={"batch_size"})
    if recipe.search is not None:
        rates = recipe.rates_of(arm).to_plain()
        facts["search"] = {**recipe.search.model_dump(mode="json"), "learning_rate": rates}
    if recipe.launch is not None:
        facts["launch"] = recipe.launch.model_dump(mode="json")
    if recipe.recovers(arm):
        facts["recover"] = recipe.recover_of(arm).model_dump(mode="json", exclude=set(HARMLESS))
    return facts


def measures(arm: Arm) -> bool:
    """Whether an arm's method measures activations on data."""
    return arm.compressed and bool(getattr(method_of(arm, 0), "needs_data", False))


def prunes_by_data(arm: Arm) -> bool:
    """Whether an arm's pruning measures activations on data."""
    from ffnkit import methods

    return any(getattr(methods.build(spec.method, **spec.settings), "needs_data", False) for spec in arm.prune)


def calibration_facts(recipe: Recipe) -> dict[str, Any]:
    """The settings of the calibration, with digests of the files that they name."""
    facts: dict[str, Any] = recipe.to_dict()["calibration"]
    for field, files in (("text", calibration_texts(recipe)), ("statistics", _statistics(recipe))):
        found = [file_digest(file) for file in files if Path(file).is_file()]
        if found:
            facts[field] = [facts[field], *found]
    if facts["statistics"] is None:
        del facts["statistics"]  # unknown to runs of older versions
    if not facts["text"]:
        del facts["mix"]  # of no use beside a task's rows, and unknown to runs of older versions
    return facts


def _statistics(recipe: Recipe) -> list[str]:
    named = recipe.calibration.statistics
    return [] if named is None else [expand(named)]


def distil_facts(recipe: Recipe) -> dict[str, Any]:
    """The settings of the distillation, with digests of the files that they name."""
    facts: dict[str, Any] = recipe.to_dict()["distil"]
    for field in ("text", "teacher"):
        path = Path(expand(facts[field])) if facts[field] else None
        if path is not None and path.is_dir():
            facts[field] = [facts[field], folder_digest(path)]
        elif path is not None and path.is_file():
            facts[field] = [facts[field], file_digest(path)]
    return facts


def distilled(recipe: Recipe, arm: str) -> bool:
    """Whether an arm passes through the stage distil."""
    return "distil" in recipe.stages and recipe.arms[arm].compressed and recipe.arms[arm].distil


def healed(recipe: Recipe, arm: str) -> bool:
    """Whether an arm passes through the stage heal."""
    return "heal" in recipe.stages and recipe.arms[arm].compressed


def stages_of(recipe: Recipe, arm: str) -> list[str]:
    """The stages that a unit of this arm passes through."""
    skipped = set() if distilled(recipe, arm) else {"distil"}
    skipped |= set() if recipe.arms[arm].compressed else {"compress", "heal"}
    skipped |= set() if recipe.arms[arm].prune else {"prune", "recover"}
    stages: list[str] = [stage for stage in recipe.stages if stage not in skipped]
    if recipe.evaluate_before:
        stages.insert(stages.index("tune") if "tune" in stages else len(stages), "before")
    if recipe.search is not None:
        stages.insert(stages.index("tune"), "search")
    if recipe.arms[arm].tickets is not None:
        stages.insert(stages.index("tune"), "tickets")
    return stages


def zeros_of(recipe: Recipe, unit: Unit) -> dict[str, Any]:
    """The shares of zeros of a unit that was pruned: before updates are merged, and in the model that comes out."""
    sparsity = (unit.marker("recover") or {}).get("sparsity") or (unit.marker("prune") or {}).get("sparsity")
    if sparsity is not None:
        kept = recipe.tuner_of(unit.arm).settings.get("keep_zeros", False)
        return {"zeros": sparsity["zeros"], "zeros_merged": sparsity["masked" if kept else "merged"]}
    markers = (unit.marker(stage) or {} for stage in ("compress", "tickets"))
    given = next((each for each in markers if "zeros" in each), None)
    if given is None:
        return {}
    return {"zeros": given["zeros"], "zeros_merged": (unit.marker("tune") or {}).get("zeros")}


# --------------------------------------------------------------------------------------- the output folder
OURS = (
    *("run.json", "results.json", "results.csv", "table.md", "report.html", "latency.json", "recipe.yaml"),
    *("judging.json", "judgements.jsonl", "logs", "units"),
)
SEARCH = "search.json"  # what a search leaves first in its folder


def check_out(out: Path) -> None:
    """See whether a run may be written to ``out``; nothing is made yet.

    Raises:
        FfnkitError: a file stands there, it cannot be written, or files of something else bear our names.
    """
    check_target(out, "run")
    taken = [name for name in (*OURS, SEARCH) if (out / name).exists()]
    if taken and read_json(out / "run.json") is None:
        found = f"it holds {', '.join(taken)}, which no run of a recipe wrote"
        raise FfnkitError(f"output folder '{out}'", found, "Give another folder")


def check_there(out: Path, record: str = "run.json", parts: Iterable[str] = ("units",), what: str = "run") -> None:
    """Raises FfnkitError where the folder of a run that is at work was removed; what was written since goes as well.

    Args:
        record: the file that the run began with.
        parts: folders that it makes while it is at work.
    """
    if (out / record).is_file():
        return
    for name in parts:
        shutil.rmtree(out / name, ignore_errors=True)
    for path in (out / ".lock", out):
        with suppress(OSError):  # it holds something else
            path.rmdir() if path.is_dir() else path.unlink()
    found = f"the folder of the {what} was removed meanwhile"
    raise FfnkitError(f"output folder '{out}'", found, "Run the same command anew")


def clear_out(out: Path) -> None:
    """Delete what a run left in ``out``, and nothing else."""
    for name in reversed(OURS):  # run.json goes last: a kill in between leaves a folder that is still ours
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_same(out: Path, wanted: Iterable[tuple[Unit, dict[str, Any]]]) -> None:
    """Refuse to mix two recipes in one folder; new arms and seeds are welcome.

    Raises:
        FfnkitError: a unit that was begun has other settings now; the line names the field.
    """
    for unit, facts in wanted:
        found, now = unit.marker("unit"), json.loads(json.dumps(facts, default=str))
        then = None if found is None else facts_today(found.get("facts", {}))
        if then is not None and now.get("calibration") is None:  # once noted for methods that did not measure
            then["calibration"] = None
        if then is None or then == now:
            continue
        field, old, new = difference(then, now)
        raise FfnkitError(
            f"running this recipe into {out}",
            f"it holds {unit.name} of another recipe ({field} was {old}, is {new})",
            "Give another --out, or --restart to delete what is there and begin anew",
        )


def difference(old: Any, new: Any, path: str = "") -> tuple[str, str, str]:
    """The first field in which two that differ do so, and what stands there in each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                return difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    return path or "recipe", json.dumps(old)[:60], json.dumps(new)[:60]
