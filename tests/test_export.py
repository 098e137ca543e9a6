"""Trained models leave the project: descriptions, exports, predictions."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import main
from pipeline.common.errors import PipelineError, UsageError
from pipeline.models.build import NormalizedModel
from pipeline.models.description import ModelDescription, load_model
from pipeline.models.export import FORMATS, export
from pipeline.models.predict import image_files, predict_files
from pipeline.models.weights import DESCRIPTION, save_weights

DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
MODELS = {
    "deit_tiny_distilled_patch16_224": DEIT,
    "deit_tiny_patch16_224": DEIT,
    "regnety_002": {"depth": 8},
}


def described(model: str) -> ModelDescription:
    return ModelDescription(
        model=model, kwargs=MODELS[model], classes=["ant", "bee", "cat"], size=32, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25), crop=0.875, heads="mean",
    )  # fmt: skip


def trained(description: ModelDescription) -> NormalizedModel:
    torch.manual_seed(0)
    model = description.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "regnety_002")) for name in MODELS])
def saved(request, tmp_path):
    description = described(request.param)
    model = trained(description)
    save_weights(tmp_path / "weights.safetensors", model.model, {"run": "0" * 32, DESCRIPTION: description.as_json()})
    return tmp_path / "weights.safetensors", model, description


def test_a_weights_file_alone_gives_the_model_back(saved):
    path, model, description = saved
    pictures = 255 * torch.rand(2, 3, 32, 32)
    loaded, found, about = load_model(path)
    assert found == description
    assert about["run"] == "0" * 32
    assert torch.equal(loaded(pictures)[0], model(pictures)[0])


def test_weights_without_a_description_are_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", trained(described("regnety_002")).model, {"run": "0" * 32})
    with pytest.raises(PipelineError, match="description of the model"):
        load_model(tmp_path / "w.safetensors")


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match="nowhere"):
        from pathlib import Path

        load_model(Path("nowhere.safetensors"))


@pytest.mark.parametrize("format", [pytest.param(name, marks=[pytest.mark.slow] * (name == "onnx")) for name in FORMATS])
def test_an_export_gives_the_models_logits_on_100_images(saved, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    _, model, description = saved
    (written,) = export(model, description, 255 * torch.rand(100, 3, 32, 32), tmp_path / "out", (format,))
    assert written.difference < 1e-4
    assert written.agreement == 1
    assert written.path.exists()
    assert not list((tmp_path / "out").glob(".partial*"))


def test_a_head_that_was_not_trained_has_no_say(tmp_path):
    description = dataclasses.replace(described("deit_tiny_distilled_patch16_224"), heads="class")
    model, pictures = trained(description), 255 * torch.rand(4, 3, 32, 32)
    before = model(pictures)[0]
    with torch.no_grad():
        model.model.head_dist.weight.add_(1)
    assert torch.equal(model(pictures)[0], before)
    (written,) = export(model, description, pictures, tmp_path, ("torch",))
    assert written.agreement == 1
    with pytest.raises(UsageError, match="not trained"):
        export(model, description, pictures, tmp_path, ("timm",))


def test_timm_loads_the_folder_with_its_labels_and_input_settings(saved, tmp_path):
    _, model, description = saved
    (written,) = export(model, description, 255 * torch.rand(2, 3, 32, 32), tmp_path, ("timm",))
    loaded = timm.create_model(f"local-dir:{written.path}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == description.classes
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert (tuple(data["mean"]), tuple(data["std"]), data["crop_pct"]) == (description.mean, description.std, description.crop)


def test_an_exported_program_names_its_classes(saved, tmp_path):
    _, model, description = saved
    (written,) = export(model, description, 255 * torch.rand(2, 3, 32, 32), tmp_path, ("torch",))
    extra = {"model.json": ""}
    torch.export.load(written.path, extra_files=extra)
    assert ModelDescription.from_json(json.loads(extra["model.json"]), "") == description
    assert (tmp_path / "classes.txt").read_text() == "ant\nbee\ncat\n"


def test_what_a_killed_export_left_is_removed(saved, tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    export(saved[1], saved[2], 255 * torch.rand(2, 3, 32, 32), tmp_path, ())
    assert [path.name for path in tmp_path.glob(".partial*")] == []


def test_a_wrong_export_is_refused_and_leaves_nothing(saved, tmp_path, monkeypatch):
    from pipeline.models import export as module

    _, model, description = saved
    monkeypatch.setitem(module.LOADERS, "torch", lambda *_: lambda images: torch.ones(len(images), 3))
    with pytest.raises(PipelineError, match="logits that differ"):
        export(model, description, 255 * torch.rand(2, 3, 32, 32), tmp_path, ("torch",))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".partial", "model"))] == []


def exported(folder, weights, format: str) -> str:
    done = CliRunner().invoke(main, ["export", "--weights", str(weights), "--format", format, "--output", str(folder)])
    assert done.exit_code == 0, done.output
    return done.output


def trained_in_run(folder, run: str):
    """Weights of a run, or with no run those of a teacher, whose file names none."""
    description = described("deit_tiny_patch16_224")
    weights = folder / (run or "teacher")[:7] / "weights.safetensors"
    weights.parent.mkdir(exist_ok=True)
    about = {"run": run} if run else {}
    save_weights(weights, trained(description).model, about | {DESCRIPTION: description.as_json()})
    return weights


@pytest.mark.parametrize(("first", "second", "kept"), [("0" * 32, "0" * 32, True), ("0" * 32, "1" * 32, False), ("", "", True)])
def test_a_second_export_keeps_other_formats_of_the_same_weights_only(tmp_path, monkeypatch, first, second, kept):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("name: example\ndata: {source: digits}\n")
    exported(tmp_path / "out", trained_in_run(tmp_path, first), "timm")
    said = exported(tmp_path / "out", trained_in_run(tmp_path, second), "torch")
    card = (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/timm").exists() == kept
    assert ("timm: deleted" in said) != kept
    assert ("local-dir:" in card) == kept and "model.pt2" in card and second in card


def test_what_is_no_export_stays_beside_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("name: example\ndata: {source: digits}\n")
    (tmp_path / "out/timm").mkdir(parents=True)
    (tmp_path / "out/README.md").write_bytes(b"\xff my own")
    exported(tmp_path / "out", trained_in_run(tmp_path, ""), "torch")
    assert (tmp_path / "out/timm").exists()


def test_predictions_are_the_models_on_evaluation_views(saved, tmp_path):
    _, model, description = saved
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (prediction,) = predict_files(model, description, [tmp_path / "a.png"])
    assert sorted(prediction.classes) == ["ant", "bee", "cat"]
    assert sum(prediction.probabilities) == pytest.approx(1)
    assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)


def test_a_photograph_taken_upright_is_seen_upright(saved, tmp_path):
    _, model, description = saved
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    lying = Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "b.png", exif=exif)
    upright, turned = predict_files(model, description, [tmp_path / "a.png", tmp_path / "b.png"])
    assert turned.probabilities == pytest.approx(upright.probabilities)


def test_folders_stand_for_the_images_below_them(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("deep/b.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "note.txt").write_text("no image")
    assert image_files([tmp_path]) == [tmp_path / "a.jpg", tmp_path / "deep/b.png"]
    with pytest.raises(UsageError, match="no images"):
        (tmp_path / "empty").mkdir()
        image_files([tmp_path / "empty"])


def test_files_that_cannot_be_read_are_named_and_the_others_are_classified(saved, tmp_path):
    _, model, description = saved
    (tmp_path / "a.jpg").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    broken, missing, good = predict_files(model, description, [tmp_path / name for name in ("a.jpg", "b.png", "c.jpg")])
    assert "a.jpg: not a readable image" in str(broken) and "c.jpg: no such file" in str(missing)
    assert good.image == tmp_path / "b.png"
