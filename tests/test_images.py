"""Image classification: reading, splits, batches, training, evaluation, compression, the command line."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_cli import bad, good
from tolerance import assert_close, assert_differs

import ffnkit
from ffnkit import methods, tasks, tune
from ffnkit.errors import FfnkitError
from ffnkit.model.finding import ffns
from ffnkit.recipe.schema import recipe_from
from ffnkit.recipe.sources import Source
from ffnkit.recipe.timing import batch_for
from ffnkit.tasks.images.batches import ImageBatches, processor_of, tokens_each
from ffnkit.tasks.images.files import listed, open_image
from ffnkit.tasks.images.sets import read_idx

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHAPE = {"image_size": 8, "patch_size": 4, "num_channels": 3}


def picture(number: int, side: int = 8) -> Image.Image:
    """Noise of its own for each number; even ones are red, odd ones blue."""
    pixels = np.random.default_rng(number).integers(0, 80, (side, side, 3), dtype=np.uint8)
    pixels[..., 0 if number % 2 == 0 else 2] += 150
    return Image.fromarray(pixels)


def encoded(number: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    picture(number, side).save(file, "png")
    return file.getvalue()


def image_folder(folder: Path, rows: int = 40, first: int = 0) -> Path:
    """Class folders "red" and "blue"."""
    for number in range(first, first + rows):
        file = folder / ("red" if number % 2 == 0 else "blue") / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number))
    return folder


def packed(folder: Path, path: Path, kind: str = "w") -> Path:
    with tarfile.open(path, kind) as archive:
        archive.add(folder, "train")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "pictures")


def save_model(folder: Path, kind: str = "vit") -> Path:
    """A tiny ViT or DeiT without a head, as the hub's are."""
    torch.manual_seed(0)
    if kind == "vit":
        transformers.ViTModel(transformers.ViTConfig(**SIZES, **SHAPE), add_pooling_layer=False).save_pretrained(folder)
    else:
        transformers.DeiTModel(transformers.DeiTConfig(**SIZES, **SHAPE), add_pooling_layer=False).save_pretrained(
            folder
        )
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "deit", "deit")


def opened(task: Any, name: Path) -> tuple[Any, Any]:
    processor = task.load_tokenizer(name)
    tune.seed_everything(0)
    return task.load_model(name, tokenizer=processor), processor


# ---- reading


def test_folder_tar_and_zip_hold_the_same_images(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))
        file.writestr("__MACOSX/red/._000.png", b"no image")
        file.writestr("readme.txt", "about")
    tables = [listed(folder), listed(packed(folder, tmp_path / "pictures.tar")), listed(archive)]
    assert [passed for _, passed in tables] == [0, 0, 2]
    rows = [sorted(zip(table["digest"], table["label"], strict=True)) for table, _ in tables]
    assert len(rows[0]) == 40 and rows[0] == rows[1] == rows[2]
    for table, _ in tables:
        row = table["digest"].index(listed(folder)[0]["digest"][3])
        read = np.asarray(open_image(table["image"][row], "RGB"))
        number = int(Path(listed(folder)[0]["image"][3].split("::")[1]).stem)
        assert (read == np.asarray(picture(number))).all()
        assert not (read == np.asarray(picture(number + 2))).all()


def test_splits_have_no_image_in_common(folder: Path, tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train")
    (train / "blue" / "again.png").write_bytes(encoded(1))  # repeated
    (train / "red" / "leaked.png").write_bytes(encoded(101))  # of the report, with another label
    report = image_folder(tmp_path / "report", 10, first=100)
    splits = tasks.image_task(train, report).splits(dev=8)
    parts = [set(part["digest"]) for part in (splits.train, splits.dev, splits.report)]
    assert [len(part) for part in parts] == [32, 8, 10]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    assert "1 repeated images dropped" in " ".join(splits.notes)
    assert "1 images dropped that are in report" in " ".join(splits.notes)
    assert sum(splits.dev["label"]) == 4  # the classes in their proportions
    again = tasks.image_task(train, report).splits(dev=8)
    assert again.train["digest"][:] == splits.train["digest"][:]
    assert "dropped" not in " ".join(tasks.image_task(folder).splits().notes)


def test_what_cannot_be_read_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(encoded(0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "red").mkdir(parents=True)
    (tmp_path / "one" / "red" / "a.png").write_bytes(encoded(0))
    (tmp_path / "list.rar").write_bytes(b"x")
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    image_folder(tmp_path / "both" / "train", 4)
    image_folder(tmp_path / "both" / "test", 4, first=50)
    packed(folder, tmp_path / "squeezed.tar", "w:gz")
    for name, part in {
        "nothing": "there is no such file or folder",
        "loose": "a.png lies in no folder of a class",
        "empty": "there are no images",
        "one": "all 1 rows have the label 'red'",
        "list.rar": "unknown kind of file '.rar'",
        "broken.zip": "it is no whole .zip",
        "squeezed.tar": "it is no whole .tar",
        "both": "its folders test, train are splits, not classes",
    }.items():
        with pytest.raises(FfnkitError) as error:
            tasks.image_task(tmp_path / name)
        assert part in str(error.value) and "\n" not in str(error.value), name
    other = image_folder(tmp_path / "other", 4)
    (other / "red").rename(other / "green")
    with pytest.raises(FfnkitError, match="2 of 4 rows have a label that .* lacks, such as 'green'"):
        tasks.image_task(folder, other)


def test_a_broken_image_is_named_when_it_is_read(vit: Path, tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train")
    (train / "red" / "000.png").write_bytes(encoded(0)[:60])
    (train / "red" / "002.png").write_bytes(b"text")
    task = tasks.image_task(train)
    processor = task.load_tokenizer(vit)
    for name in ("000", "002"):
        with pytest.raises(FfnkitError, match=f"image red/{name}.png of .*: it cannot be read"):
            task.collator(processor)([{"pixel_values": f"{train}::red/{name}.png", "labels": 0}])


def test_digits_need_no_data_folder() -> None:
    splits = tasks.get("digits").splits()
    assert (len(splits.train), len(splits.dev), len(splits.report)) == (1366, 72, 359)
    image = open_image(splits.train[0]["image"], "L")
    assert image.size == (8, 8) and np.asarray(image).max() > 200


def test_cifar10_and_mnist_from_folders(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 500)):
        for number in range(40):
            name = ("cat", "dog")[number % 2]
            file = tmp_path / "cifar10" / split / name / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(first + number, 32).save(file)
    splits = tasks.get("cifar10").splits(tmp_path)
    assert len(splits.report) == 40 and set(splits.report["label"][:]) == {3, 5}
    assert tasks.get("cifar10").metrics == ("accuracy", "top5")
    (tmp_path / "mnist").mkdir()
    images = np.random.default_rng(0).integers(0, 255, (50, 28, 28), dtype=np.uint8)
    for what, array in (("images-idx3", images), ("labels-idx1", (np.arange(50) % 10).astype(np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (tmp_path / "mnist" / f"t10k-{what}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    splits = tasks.get("mnist").splits(tmp_path)
    assert "no train split" in splits.notes[0] and len(splits.report) == 12
    assert (read_idx(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz") == images).all()
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head[:3]))
    with pytest.raises(FfnkitError, match="it is no whole IDX file"):
        tasks.get("mnist").splits(tmp_path)


def test_a_set_of_the_hub(tmp_path: Path) -> None:
    """A folder of parquet files opens as a data set of the hub does."""
    import datasets

    kinds = datasets.Features(
        {"img": datasets.Image(), "colour": datasets.ClassLabel(names=["red", "blue"]), "row": datasets.Value("int64")}
    )
    for split, first in (("train", 0), ("test", 100)):
        rows = {"img": [picture(first + n) for n in range(20)], "colour": [n % 2 for n in range(20)], "row": range(20)}
        datasets.Dataset.from_dict({**rows, "row": list(rows["row"])}, features=kinds).to_parquet(
            tmp_path / "set" / f"{split}.parquet"
        )
    task = tasks.choose(train=f"hub:{tmp_path / 'set'}")
    assert task.id2label == {0: "red", 1: "blue"} and task.pipeline_tag == "image-classification"
    splits = task.splits()
    assert len(splits.report) == 20
    first = splits.report[3]
    assert (np.asarray(open_image(first["image"], "RGB")) == np.asarray(picture(103))).all()
    assert tasks.choose(train=f"hub:{tmp_path / 'set'}", label="row").num_labels == 20
    with pytest.raises(FfnkitError, match="no label column 'shade'"):
        tasks.choose(train=f"hub:{tmp_path / 'set'}", label="shade")


# ---- batches


def test_a_processor_from_the_config_and_from_files(vit: Path, tmp_path: Path) -> None:
    task = tasks.get("digits")
    made = task.load_tokenizer(vit)
    assert dict(made.size) == {"height": 8, "width": 8} and list(made.image_mean) == [0.5] * 3
    save_model(tmp_path)
    made.image_mean = [0.25] * 3
    made.save_pretrained(tmp_path)
    assert list(task.load_tokenizer(tmp_path).image_mean) == [0.25] * 3
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(FfnkitError, match="image processor of"):
        task.load_tokenizer(tmp_path)


def test_a_processor_of_another_size_is_refused(vit: Path) -> None:
    task = tasks.get("digits")
    large = transformers.ViTConfig(image_size=16, patch_size=4)
    with pytest.raises(FfnkitError, match="makes images of 16 x 16 and the model takes 8 x 8"):
        task.load_model(vit, tokenizer=processor_of(large))
    grey = processor_of(transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1))
    with pytest.raises(FfnkitError, match="1 channels and the model takes 3"):
        task.load_model(vit, tokenizer=grey)


def test_a_grey_model_reads_grey_images(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    task = tasks.get("digits")
    model, processor = opened(task, tmp_path)
    rows = task.splits(report_limit=4).report
    batch = task.collator(processor, model)(list(task.encode(rows, processor)))
    assert batch["pixel_values"].shape == (4, 1, 8, 8)
    expected = np.stack([np.asarray(open_image(ref, "L")) for ref in rows["image"]])[:, None] / 127.5 - 1
    assert_close(batch["pixel_values"], torch.tensor(expected, dtype=torch.float32), rel=1e-6)


def batches(folder: Path, vit: Path, augment: str, **more: Any) -> torch.Tensor:
    task = tasks.image_task(folder)
    processor = task.load_tokenizer(vit)
    rows = list(task.encode(task.splits().train, processor))[:8]
    return ImageBatches(processor, augment=augment, **more)(rows)["pixel_values"]


def test_augmentation_depends_on_seed_epoch_and_image_alone(folder: Path, vit: Path) -> None:
    plain, flipped = batches(folder, vit, "none"), batches(folder, vit, "flip", seed=1)
    mirrored = [bool((new == old.flip(-1)).all()) for new, old in zip(flipped, plain, strict=True)]
    assert 0 < sum(mirrored) < 8 and all(
        bool((new == (old.flip(-1) if turned else old)).all())
        for new, old, turned in zip(flipped, plain, mirrored, strict=True)
    )
    moved = batches(folder, vit, "crop-flip", seed=1, epoch=2)
    assert (moved == batches(folder, vit, "crop-flip", seed=1, epoch=2)).all()
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}):
        assert not (moved == batches(folder, vit, "crop-flip", **other)).all()
    # An eighth of 8 pixels: every image is one of 9 places of the padded one, mirrored or not.
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1))
    for new, old in zip(moved, padded, strict=True):
        places = [old[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert any(bool((new == each).all() or (new == each.flip(-1)).all()) for each in places)


def test_calibration_counts_patches(folder: Path, vit: Path, deit: Path) -> None:
    task = tasks.image_task(folder)
    for name, each in ((vit, 5), (deit, 6)):  # 4 patches, a class token, DeiT's second one
        model, processor = opened(task, name)
        assert tokens_each(model.config) == each
        settings = tune.CalibrationSettings(tokens=12 * each, batch_size=4)
        found = tune.calibration_batches(model, processor, settings, task=task, rows=task.splits().train)
        assert [len(batch["pixel_values"]) for batch in found] == [4, 4, 4]
        with torch.no_grad():
            hidden = model(found[0]["pixel_values"], output_hidden_states=True).hidden_states[0]
        assert hidden.shape[1] == each


# ---- training, evaluation, compression


@pytest.mark.slow
def test_digits_are_learnt_and_compressed(vit: Path, tmp_path: Path) -> None:
    task = tasks.get("digits")
    splits = task.splits(train_limit=400, report_limit=100)
    model, processor = opened(task, vit)
    before = tune.evaluate(model, processor, task, splits.report)
    settings = tune.TrainSettings(learning_rate=3e-3, steps=40, batch_size=64, eval_every=20, augment="none")
    result = tune.train(model, processor, task, splits, settings, out_dir=tmp_path / "run", progress=False)
    after = tune.evaluate(result.model, processor, task, splits.report)
    assert set(after) == {"accuracy", "top5", "loss"}
    assert after["accuracy"] > before["accuracy"] + 0.2 and after["top5"] >= after["accuracy"]
    data = tune.calibration_batches(result.model, processor, task=task, rows=splits.train)
    plan = ffnkit.plan(result.model, methods.build("calibrated-fusion", width=0.5), data=data)
    ffnkit.apply(result.model, plan)
    assert {ffn.width for ffn in ffns(result.model)} == {16}
    small = tune.evaluate(result.model, processor, task, splits.report)
    for name, write in (("compact", ffnkit.save), ("standard", ffnkit.export)):
        write(result.model, tmp_path / name, tokenizer=processor)
        assert (tmp_path / name / "preprocessor_config.json").is_file()
        again = task.load_model(tmp_path / name, tokenizer=task.load_tokenizer(tmp_path / name), trained_head=True)
        assert tune.evaluate(again, processor, task, splits.report)["loss"] == pytest.approx(small["loss"], rel=1e-5)
    assert small["loss"] != after["loss"]


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_killed_run_ends_with_the_same_weights(kind: str, folder: Path, request: Any, tmp_path: Path) -> None:
    task = tasks.image_task(folder)
    splits = task.splits()

    def run(out: Path, steps: int, augment: str = "crop-flip") -> torch.Tensor:
        model, processor = opened(task, request.getfixturevalue(kind))
        more = {"schedule": "constant", "warmup": 0, "keep_checkpoints": True, "keep_best": False, "eval_every": 2}
        settings = tune.TrainSettings(steps=steps, batch_size=8, augment=augment, learning_rate=1e-2, **more)
        model = tune.train(model, processor, task, splits, settings, out_dir=out, progress=False).model
        return model.classifier.weight.detach().clone()

    whole = run(tmp_path / "whole", 6)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    assert_close(run(tmp_path / "killed", 6), whole, rel=1e-6)
    assert_differs(run(tmp_path / "plain", 6, "none"), whole, rel=1e-3)


def test_augmentation_is_refused_for_texts_and_told_only_where_it_is(tmp_path: Path) -> None:
    assert "augment" not in tune.TrainSettings().model_dump()
    assert tune.TrainSettings(augment="flip").model_dump()["augment"] == "flip"
    settings = tune.TrainSettings(augment="flip")
    with pytest.raises(FfnkitError, match="task sst2 has no images"):
        tune.train(torch.nn.Linear(1, 1), None, tasks.get("sst2"), None, settings, out_dir=tmp_path)


def test_top5_and_accuracy() -> None:
    task = tasks.get("digits")
    scores = np.tile(np.arange(10.0), (4, 1))  # class 9 wins, 5 to 9 are the first five
    assert task.compute_metrics(scores, np.array([9, 5, 4, 0])) == {"accuracy": 0.25, "top5": 0.5}
    assert task.compute_metrics(np.array([9, 9]), np.array([9, 1])) == {"accuracy": 0.5}
    with pytest.raises(FfnkitError, match="NaN"):
        task.compute_metrics(np.full((2, 10), np.nan), np.array([1, 2]))


def test_a_head_of_other_classes_is_refused_or_drawn_anew(folder: Path, vit: Path, tmp_path: Path) -> None:
    task = tasks.image_task(folder)
    with pytest.raises(FfnkitError, match="no trained head"):
        task.load_model(vit, trained_head=True)
    model, processor = opened(task, vit)
    assert model.config.id2label == {0: "blue", 1: "red"}
    model.save_pretrained(tmp_path)
    assert task.load_model(tmp_path, trained_head=True).num_labels == 2
    with pytest.raises(FfnkitError, match="other labels"):
        tasks.get("digits").load_model(tmp_path, trained_head=True)
    first, second = (opened(tasks.get("digits"), tmp_path)[0].classifier.weight for _ in range(2))
    assert first.shape[0] == 10 and (first == second).all()


def test_deit_opens_without_its_teachers_head(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**SIZES, **SHAPE, num_labels=2)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    model, _ = opened(tasks.image_task(folder), tmp_path)
    assert type(model) is transformers.DeiTForImageClassification


def test_adapters_train_on_images(folder: Path, vit: Path, tmp_path: Path) -> None:
    task = tasks.image_task(folder)
    model, processor = opened(task, vit)
    before = model.state_dict()["vit.layers.0.mlp.fc1.weight"].clone()
    settings = tune.TrainSettings(steps=2, batch_size=8, augment="flip", learning_rate=1e-2)
    tuner = {"name": "lora", "rank": 2}
    result = tune.train(model, processor, task, task.splits(), settings, tuner=tuner, out_dir=tmp_path, progress=False)
    assert type(result.model) is transformers.ViTForImageClassification
    assert_differs(result.model.state_dict()["vit.layers.0.mlp.fc1.weight"], before, rel=1e-6)


def test_layers_are_distilled_on_images(folder: Path, vit: Path) -> None:
    task = tasks.image_task(folder)
    model, processor = opened(task, vit)
    teacher, _ = opened(task, vit)
    ffnkit.apply(model, ffnkit.plan(model, methods.build("fusion", width=0.5)))
    settings = tune.DistilSettings(steps=3, batch_size=8)
    data, collate = tune.distil_examples(model, processor, settings, task, task.splits().train)
    assert tune.distil(model, teacher, data, settings, collate=collate, progress=False).steps == 3


# ---- recipes and the command line


def test_a_recipe_of_images(folder: Path, vit: Path) -> None:
    data = {"name": "x", "model": str(vit), "task": {"train": str(folder)}, "arms": {"whole": {}}}
    recipe = recipe_from({**data, "tune": {"augment": "flip"}})
    source = Source(recipe)
    assert source.task.kind == "image-classification" and source.empty().classifier.weight.is_meta
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in (source.empty(), source.model(0))]
    assert shapes[0] == shapes[1]  # of the task's classes
    batch = batch_for(source.model(0), 3, 128)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    digest = source.data_digest()
    assert digest == Source(recipe).data_digest()
    assert Source(recipe_from({**data, "task": "digits"})).data_digest() != digest
    with pytest.raises(FfnkitError, match="images have the class of their folder"):
        recipe_from({**data, "task": {"train": str(folder), "label": "colour", "kind": "image-classification"}})


@pytest.mark.slow
def test_the_command_line(folder: Path, vit: Path, tmp_path: Path) -> None:
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    good("compress", vit, "--task", f"images:{folder}", "--set", "width=0.5", "--out", small)
    options = ("--steps", 3, "--batch-size", 8, "--set", "augment=crop-flip", "--json")
    report = json.loads(good("tune", small, "--train-file", folder, *options, "--out", tuned).stdout)
    assert set(report["metrics"]) == {"accuracy", "loss"} and report["settings"]["augment"] == "crop-flip"
    assert "pipeline_tag: image-classification" in (tuned / "README.md").read_text()
    assert (tuned / "preprocessor_config.json").is_file()
    found = json.loads(good("eval", tuned, "--train-file", folder, "--split", "report", "--json").stdout)
    assert found["metrics"] == pytest.approx(report["metrics"])
    final = tmp_path / "final"
    good("export", tuned, "--out", final)
    assert transformers.AutoModelForImageClassification.from_pretrained(final).config.intermediate_size == 16
    assert transformers.AutoImageProcessor.from_pretrained(final).size["height"] == 8


def test_the_command_line_refuses_in_one_line(folder: Path, vit: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "out")
    assert "there are no images" in bad("tune", vit, "--train-file", tmp_path / "empty", *out)
    assert "no such file or folder" in bad("tune", vit, "--train-file", tmp_path / "absent", *out)
    assert "class of their folder" in bad("tune", vit, "--train-file", folder, "--kind", "image-classification",
                                          "--label-column", "x", *out)  # fmt: skip
    assert "holds images" in bad("tune", vit, "--train-file", f"hub:{folder}", "--kind", "language-modelling", *out)
    assert "augment" in bad("tune", vit, "--train-file", folder, "--set", "augment=turn", *out)
    assert "no such file or folder" in bad("compress", vit, "--task", "images:absent", "--set", "width=0.5", *out)
    assert "head 'words'" in bad("tune", vit, "--task", "digits", "--head", "words", *out)
