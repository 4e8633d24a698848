"""What lies beside a model travels with it, through every entry point; sentence-transformers stay what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_recipe_run import recipe_of, run, tiny
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import ffnkit as fk
from ffnkit import tasks
from ffnkit.cli.program import app
from ffnkit.errors import FfnkitError
from ffnkit.io.loading import hub_reachable
from ffnkit.io.snapshots import folder_of

HALF = ("--method", "fusion", "--set", "width=0.5", "--cost-tokens", "0")
TRAVELS = {
    "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json", "LICENSE", "own_code.py",
    "additional_chat_templates/tool.jinja", "chat_template.jinja", "labels/names.txt", "eval/notes.txt",
}  # fmt: skip
STAYS = {
    "pytorch_model.bin", "onnx/config.json", "old_onnx/model.onnx", "old_onnx/config.json",
    "trainer_state.json", "all_results.json", ".git/HEAD",
    "model.safetensors.index.json", "params.json", "predictions.jsonl", "onnx/tokenizer.json", "original/params.json",
    "saved_model/1/variables/variables.data-00000-of-00001", "openvino_model.xml", "old.onnx.data", "bert.ckpt.index",
    "eval/similarity_evaluation_results.csv", "runs/now/events.out.tfevents.1", "logs/loss.txt", "openvino/config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny(tmp_path_factory.mktemp("beside"))
    for name in TRAVELS | STAYS - {"pytorch_model.bin", "model.safetensors.index.json"}:
        (base / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (base / "model" / name).write_text("{}" if name.endswith(".json") else name)
    return base


def sentences(model: Path, folder: Path, *, nested: bool = False) -> Path:
    """The model as the transformer of a sentence-transformers folder, with a dense layer behind it."""
    inner = folder / "0_Transformer" if nested else folder
    shutil.copytree(model, inner)
    kinds = {"1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    rows = [{"path": "0_Transformer" if nested else "", "type": "sentence_transformers.models.Transformer"}]
    rows += [{"path": name, "type": f"sentence_transformers.models.{kind}"} for name, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "name": str(i), **row} for i, row in enumerate(rows)]))
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine"}')
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {
        "in_features": 16,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    weights = {"linear.weight": torch.randn(6, 16, generator=torch.manual_seed(0)), "linear.bias": torch.zeros(6)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    return folder


def inside(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def cli(*words: object) -> None:
    found = CliRunner().invoke(app, [*map(str, words), "--quiet"])
    assert found.exit_code == 0, found.output


def test_in_python(source: Path, tmp_path: Path) -> None:
    for name, tokenizer in (("copied", None), ("given", AutoTokenizer.from_pretrained(source / "model"))):
        model = fk.load(source / "model")
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
        fk.save(model, tmp_path / name, tokenizer=tokenizer)
        found = inside(tmp_path / name)
        assert found >= TRAVELS and not STAYS & found, found
        assert "tokenizer.json" in found
    fk.export(model, tmp_path / "standard")
    assert inside(tmp_path / "standard") >= TRAVELS
    assert (tmp_path / "standard" / "README.md").read_text() != "README.md"


@pytest.mark.parametrize("compact", [True, False])
def test_a_subfolder_is_a_model_with_files_of_its_own(source: Path, tmp_path: Path, compact: bool) -> None:
    model = fk.load(source / "model")
    if compact:
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1, layers="last:1")))
    fk.save(model, tmp_path / "whole" / "inner")
    (tmp_path / "whole" / "of_the_whole.txt").write_text("")
    opened = fk.load(tmp_path / "whole", subfolder="inner")
    fk.save(opened, tmp_path / "again")
    assert inside(tmp_path / "again") >= TRAVELS and "of_the_whole.txt" not in inside(tmp_path / "again")
    wanted = AutoModel.from_pretrained(tmp_path / "whole", subfolder="inner").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in opened.state_dict().items())


@pytest.fixture
def cached(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the hub with two revisions of org/several: another model's files at the root, the model in inner/."""
    repository = tmp_path / "hub" / "models--org--several"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        inner = repository / "snapshots" / commit / "inner"
        shutil.copytree(source / "model", inner)
        (inner / "chat_template.jinja").write_text(revision)
        for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "of_the_whole.txt"):
            (inner.parent / name).write_text("of another")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_reachable.cache_clear()
    yield tmp_path / "hub"
    hub_reachable.cache_clear()


@pytest.mark.parametrize("revision", ["main", "v1", "b" * 40])
def test_files_of_a_hub_name_are_those_of_the_subfolder_and_the_revision(
    source: Path, cached: Path, tmp_path: Path, revision: str
) -> None:
    how = {"subfolder": "inner", "revision": revision, "cache_dir": str(cached)}
    for number, open_one in enumerate((fk.load, tasks.get("sst2").load_model)):
        model: Any = open_one("org/several", **how)
        fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
        for write in (fk.save, fk.export):
            out = tmp_path / f"{write.__name__}-{number}"
            write(model, out)
            found = inside(out)
            assert found >= TRAVELS | {"tokenizer.json"} and not (STAYS | {"of_the_whole.txt"}) & found
            assert (out / "chat_template.jinja").read_text() == ("main" if revision == "main" else "v1")
            assert AutoTokenizer.from_pretrained(out).get_vocab()
    whole = folder_of("org/several", revision=revision, cache_dir=str(cached))
    assert whole is not None and (whole / "of_the_whole.txt").is_file()  # the control
    assert folder_of("org/several", "other", cache_dir=str(cached)) is None


def test_a_folder_inside_the_source_is_not_copied_into_itself(source: Path) -> None:
    model = fk.load(source / "model")
    for _ in range(2):  # the second time it lies there
        fk.save(model, source / "model" / "out" / "small")
        assert not any(name.startswith("out") for name in inside(source / "model" / "out" / "small"))
    shutil.rmtree(source / "model" / "out")


@pytest.mark.slow
def test_by_the_command_line_and_a_recipe(source: Path, tmp_path: Path) -> None:
    cli("compress", source / "model", *HALF, "--form", "both", "--out", tmp_path / "small")
    table = ("--train-file", source / "train.csv", "--text-column", "text", "--label-column", "label")
    steps = ("--steps", 1, "--batch-size", 4, "--max-length", 16)
    cli("tune", tmp_path / "small" / "compact", *table, *steps, "--out", tmp_path / "tuned")
    cli("tune", source / "model", *table, *steps, "--tuner", "dsee", "--form", "apart", "--out", tmp_path / "apart")
    cli("export", tmp_path / "tuned", "--out", tmp_path / "final")
    folders = [tmp_path / name for name in ("small/compact", "small/standard", "tuned", "apart/base", "final")]
    run(recipe_of(source, stages=["compress", "evaluate", "export"]), tmp_path / "run")
    folders += [tmp_path / f"run/units/half/seed-0/{form}" for form in ("compact", "standard")]
    for folder in folders:
        found = inside(folder)
        assert found >= TRAVELS and not STAYS & found, (folder, found)


@pytest.mark.parametrize("nested", [False, True])
def test_sentence_transformers_stay_whole(source: Path, tmp_path: Path, nested: bool) -> None:
    whole = sentences(source / "model", tmp_path / "st", nested=nested)
    model = fk.load(whole)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.save(model, tmp_path / "small")
    again = fk.load(tmp_path / "small")
    fk.export(again, tmp_path / "plain")
    wanted = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    wanted |= {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "preprocessor_config.json"}
    for folder in (tmp_path / "small", tmp_path / "plain"):
        assert wanted <= inside(folder)
        assert [row["path"] for row in json.loads((folder / "modules.json").read_text())][:2] == ["", "1_Pooling"]
        assert not any(name.startswith("0_Transformer") for name in inside(folder))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    fk.save(classifier, tmp_path / "classifier")  # with another head it is no model of embeddings
    assert not {"modules.json", "1_Pooling/config.json"} & inside(tmp_path / "classifier")


def test_modules_outside_of_the_folder_are_none(source: Path, tmp_path: Path) -> None:
    whole = sentences(source / "model", tmp_path / "st")
    rows = json.loads((whole / "modules.json").read_text())
    rows[1]["path"] = "../outside"
    (whole / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("kept")
    fk.save(fk.load(whole), tmp_path / "deep" / "small")
    assert not list((tmp_path / "deep").rglob("secret"))


def test_two_transformers_in_a_folder_are_refused(source: Path, tmp_path: Path) -> None:
    whole = sentences(source / "model", tmp_path / "st")
    shutil.copytree(source / "model", whole / "1_Pooling", dirs_exist_ok=True)
    with pytest.raises(FfnkitError, match="several of its modules are transformers"):
        fk.load(whole)


@pytest.mark.parametrize("held", ["nested", "beside"])
def test_one_of_two_transformers_is_compressed_by_itself(source: Path, tmp_path: Path, held: str) -> None:
    """What the refusal of the whole tells to do: of a router's routes, and of modules beside each other."""
    whole, parts = tmp_path / "st", ("query_0_Transformer", "document_0_Transformer")
    for part in parts:
        shutil.copytree(source / "model", whole / part)
        (whole / part / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    rows = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}]
    if held == "beside":
        rows = [{"idx": i, "name": str(i), "path": part, "type": "x.Transformer"} for i, part in enumerate(parts)]
    (whole / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(FfnkitError, match="Compress each of these folders by itself, and put the results in their"):
        fk.load(whole)
    model = fk.load(whole / parts[1])
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.5, restarts=1)))
    fk.export(model, tmp_path / "small")
    assert {"tokenizer.json", "sentence_bert_config.json"} <= inside(tmp_path / "small")
    assert "modules.json" not in inside(tmp_path / "small")


def test_forms_of_a_vocabulary_travel_with_what_holds_it(source: Path, tmp_path: Path) -> None:
    """llama.cpp's converter reads tokenizer.model of Gemma and others; transformers writes tokenizer.json alone."""
    folder = shutil.copytree(source / "model", tmp_path / "source")
    forms = {"tokenizer.model", "vocab.txt", "own.tiktoken", "normalizer.json"}
    for name in forms:
        (folder / name).write_text("old")
    (folder / "special_tokens_map.json").write_text("{}")
    model = fk.load(folder)
    more = AutoTokenizer.from_pretrained(source / "model")
    more.add_tokens(["<new>"])
    other = more.train_new_from_iterator([["another text"]], 40)
    for name, tokenizer in {"same": AutoTokenizer.from_pretrained(folder), "more": more, "other": other}.items():
        fk.save(model, tmp_path / name, tokenizer=tokenizer)
        assert forms & inside(tmp_path / name) == (set() if name == "other" else forms), name
        assert "special_tokens_map.json" not in inside(tmp_path / name)
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
def test_the_library_opens_them(source: Path, tmp_path: Path, nested: bool) -> None:
    library = pytest.importorskip("sentence_transformers")
    whole = sentences(source / "model", tmp_path / "st", nested=nested)
    before = library.SentenceTransformer(str(whole), device="cpu")
    model = fk.load(whole)
    fk.apply(model, fk.plan(model, fk.Fusion(width=0.25)))
    fk.save(model, tmp_path / "compact")
    fk.export(model, tmp_path / "standard")
    texts = ["good film", "the plot was very poor"]
    found = []
    for name in ("compact", "standard"):
        opened: Any = library.SentenceTransformer(str(tmp_path / name), device="cpu")
        assert opened.max_seq_length == before.max_seq_length == 12
        assert [type(each) for each in opened] == [type(each) for each in before]
        found.append(torch.as_tensor(opened.encode(texts)))
    assert found[0].shape == before.encode(texts).shape == (2, 6)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], torch.as_tensor(before.encode(texts)), atol=1e-4)  # it is compressed


def test_a_base_without_a_list_of_modules_is_a_plain_model(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "model", tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("[1, 2]")
    assert type(fk.load(tmp_path / "model")) is type(AutoModel.from_pretrained(source / "model"))
