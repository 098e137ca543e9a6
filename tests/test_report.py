"""Evaluation's numbers, the pictures and tables made of them, and the report that holds them all."""

import csv
import dataclasses
import functools
import json
import re
import shutil
import tempfile
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import resolve
from pipeline.config.paths import (
    evaluation_folder,
    finetune_folder,
    index_path,
    outputs,
    state_folder,
    student_folder,
    teacher_folder,
)
from pipeline.config.schema import Recipe, Student
from pipeline.models.build import build_student, build_teacher, parameter_count
from pipeline.models.evaluation import classifiers, disagreement, multiply_adds, top_k_accuracy
from pipeline.models.teacher import save_teacher
from pipeline.models.tokens import LayerCosine
from pipeline.models.weights import DESCRIPTION, read_weights, save_weights
from pipeline.report.analysis import Analysis
from pipeline.report.calibration import calibrate
from pipeline.report.classes import class_results, confusions
from pipeline.report.comparison import Predictions, find_headline
from pipeline.report.entries import Entry, list_entries, load_entry
from pipeline.report.evaluator import Evaluator
from pipeline.report.examples import (
    Example,
    ExampleView,
    draw_examples,
    shown_positions,
    shown_views,
    training_examples,
)
from pipeline.report.grid import Cell, Section
from pipeline.report.html import CLASSES, MATRIX_CLASSES, PAIRS, Report, write_report
from pipeline.report.intervals import accuracy_interval
from pipeline.report.pictures import Mistake, confident_mistakes, thumbnail
from pipeline.report.plots import DARK, LIGHT, Curve, plot_curves, plot_disagreement
from pipeline.report.settings import describe_report, loading_code, training_rows
from pipeline.report.tables import Result, SizeResult, format_sizes, format_table
from pipeline.shards.index import Index
from pipeline.shards.indexing import index_shard, write_index, write_shard
from pipeline.training.log import Log, write_curve
from pipeline.views.draw import draw_mix
from stages import evaluate, prepare, teacher_logits

property_settings = settings(derandomize=True, deadline=None, max_examples=40)

TOKEN = "token & <b>$x$</b>"
RESULTS = (
    Result("teacher", "regnety_160, 224 px", "class", 0.82, 0.961, 83_590_000, 15_911_000_000, 335.0),
    Result(TOKEN, "deit_tiny, 224 px", "class", 0.739, 0.915, 5_910_800, 1_261_000_000, 2529.5),
    Result(TOKEN, "deit_tiny, 224 px", "mean", 0.745, 0.97, 5_910_800, 1_261_000_000, 2529.5),
)
TABLE = {"truth": {"truth": 0.0, TOKEN: 0.182}, TOKEN: {"truth": 0.182, TOKEN: 0.0}}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def example_view(number: int, method: str, size: int, probability: float | None) -> ExampleView:
    picture = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    return ExampleView(number, picture, 255 - picture, method, 0.63, "a $dog$", "a long-named cat", probability)


# pictures


def test_curves_show_every_run_that_was_logged(tmp_path):
    first = {"epoch": "1", "loss": "2.3", "val_top1_class": "", "val_top1_mean": ""}
    second = {"epoch": "2", "loss": "1.9", "val_top1_class": "0.5", "val_top1_mean": "0.6"}
    alone = {"epoch": "1", "loss": "3.3", "val_top1_class": "0.4"}
    # the last is of a teacher that was not trained here
    runs = {"two $heads$": [first, second], "one head": [alone], "none": []}
    plot_curves(tmp_path / "curves.png", {name: Curve("labels", epochs) for name, epochs in runs.items()})
    picture = pixels(tmp_path / "curves.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 1000
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert (0x00, 0x72, 0xB2) in colours and (0xD5, 0x5E, 0x00) in colours
    assert (0x00, 0x9E, 0x73) not in colours


def test_losses_of_different_objectives_have_axes_of_their_own(tmp_path):
    epochs = [{"epoch": str(number), "loss": str(3 - number), "val_top1_class": "0.5"} for number in (1, 2)]
    heights = []
    for count in (1, 2, 3, 4):
        curves = {f"run {number}": Curve(f"objective {number % count}", epochs) for number in range(4)}
        plot_curves(tmp_path / "curves.png", curves)
        heights.append(pixels(tmp_path / "curves.png").shape[0])
    assert heights[0] < heights[1] == heights[2] < heights[3]  # with the accuracy: 2, 3, 4 and 5 axes in rows of 2


def test_curves_can_be_drawn_for_a_dark_page(tmp_path):
    curves = {"run": Curve("labels", [{"epoch": "1", "loss": "2", "val_top1_class": "0.5"}])}
    for theme in (LIGHT, DARK):
        plot_curves(tmp_path / f"{theme.name}.png", curves, theme)
    light, dark = (pixels(tmp_path / f"{theme.name}.png") for theme in (LIGHT, DARK))
    assert light.shape == dark.shape
    assert np.median(light) > 250 and np.median(dark) < 40


def test_no_curve_at_all_is_a_picture_too(tmp_path):
    plot_curves(tmp_path / "curves.png", {})
    assert pixels(tmp_path / "curves.png").min() < 128


@pytest.mark.parametrize("count", [1, 2, 7])
def test_heat_map_darkens_with_disagreement(tmp_path, count):
    names = [f"a student of a long name {number}" for number in range(count)]
    table = {a: {b: float(a != b) * 0.2 for b in names} for a in names}
    plot_disagreement(tmp_path / "map.png", table)
    picture = pixels(tmp_path / "map.png").astype(int)
    blue = picture[..., 2] - picture[..., 0] > 60
    assert picture.shape[0] > 200 and blue.any() == (count > 1)


@pytest.mark.parametrize(("size", "probability"), [(8, None), (32, 0.87), (300, 1.0)])
def test_example_views_keep_hard_edges_of_small_pictures(tmp_path, size, probability):
    methods = ("mixup", "cutmix", "none")
    views = [example_view(number, method, size, probability) for number, method in enumerate(methods)]
    original = np.zeros((10, 20, 3), np.uint8)
    examples = [Example("a cat", original, views), Example("$", original, views[:2])]
    draw_examples(tmp_path / "views.png", examples)
    picture = pixels(tmp_path / "views.png")
    assert picture.shape[1] > 1000 and picture.shape[0] > 500
    if size == 8:
        shown = {tuple(colour) for colour in picture.reshape(-1, 3)}
        assert {tuple(colour) for colour in views[0].picture.reshape(-1, 3)} <= shown


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plot_disagreement(tmp_path / name, TABLE)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# tables and the report


ENTRY = Entry("hard", "deit_tiny", Path("hard"), "", 224, 0.875, "float32")


def analysis(results: tuple[Result, ...] = RESULTS, classes: int = 3) -> Analysis:
    """Of images of so many classes, each as often as its number + 1, and of which one is classified as the next."""
    labels = np.repeat(np.arange(classes), np.arange(classes) + 1)
    predicted = labels.copy()
    starts = np.cumsum(np.arange(classes))
    predicted[starts] = (labels[starts] + 1) % classes
    names = [f"<b>{number}" for number in range(classes)]
    student = dataclasses.replace(ENTRY, name=TOKEN, student=Student())
    intervals = {(row.model, row.classifier): accuracy_interval(np.array([True, False])) for row in results}
    calibration = {TOKEN: calibrate(np.full(len(labels), 0.75), predicted == labels)}
    return Analysis(
        find_headline([student], {TOKEN: {"class": Predictions(predicted, np.full(len(predicted), 0.5, np.float32))}}, labels),
        intervals,
        class_results(names, labels, {TOKEN: predicted}, TOKEN),
        confusions(names, labels, predicted),
        [Mistake(thumbnail(np.zeros((8, 8, 3), np.uint8), "a/<i>key"), "<i>", "dog", 0.987)],
        TABLE,
        ["token softmax"],
        calibration,
        calibration,
        {},
    )


@functools.cache
def report(results: tuple[Result, ...] = RESULTS, classes: int = 3, two_tokens: bool = True) -> str:
    curves = {TOKEN: Curve("labels", [{"epoch": "1", "loss": "2", "val_top1_class": "0.5"}])}
    tokens = {TOKEN: [LayerCosine(layer, 0.5, 0.1) for layer in ("parameters", "input", "1", "norm")]} if two_tokens else {}
    views = Section([[Cell(np.zeros((300, 100, 3), np.uint8), "<i>")]], headings=["original"])
    facts = {"Students": {TOKEN: "hard <i>"}, "Empty": {}}
    shown = analysis(results, classes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_report(path, Report("run <1>", list(results), shown, curves, tokens, views, [], facts, "print('<i>')"))
        assert list(path.parent.iterdir()) == [path]
        return path.read_text(encoding="utf-8")


def test_report_is_one_file_that_opens_offline():
    page = re.sub(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", "PICTURE", report())
    assert page.count('src="PICTURE"') == 5 and page.count('srcset="PICTURE"') == 3
    assert "http" not in page and "<script" not in page and "<link" not in page and "url(" not in page
    assert "{{" not in page and "{%" not in page


def test_report_shows_tokens_only_of_models_that_have_two():
    pages = [report(two_tokens=two) for two in (True, False)]
    assert ["distillation token" in page for page in pages] == [True, False]


def test_report_shows_the_calibration_of_every_model():
    # 3 of 6 images are right, at a confidence of 75 %
    cells = re.search(r"<h2>Calibration</h2>.*?<tbody>.*?</th>(.*?)</tr>", report(), re.S)
    assert re.findall(r"<td>(.*?)</td>", cells[1])[:3] == ["50.00", "75.00", "25.00"]


def test_report_escapes_every_name():
    page = report()
    assert "<b>" not in page and "<i>" not in page and "<1>" not in page
    assert unescape(page).count(TOKEN) >= 4  # results, twice in the matrix, the run


def marked(page: str) -> list[str]:
    return re.findall(r"<td[^>]*><strong>(.*?)</strong>", page)


def test_report_marks_the_highest_accuracies_and_no_cost():
    assert marked(report()) == ["82.00", "97.00"]


def test_ties_on_paper_are_not_marked():
    shares = {"a": 0.8, "b": 0.800001, "c": 0.7}
    twins = [Result(name, "", "class", 0.5, top5, 10, 10, 1.0) for name, top5 in shares.items()]
    assert marked(report(tuple(twins))) == []


def test_report_names_what_table_4_leaves_out():
    assert "Left out, as the table compares the heads of one student: token softmax." in " ".join(report().split())


@pytest.mark.parametrize("classes", [2, MATRIX_CLASSES, MATRIX_CLASSES + 1, 300])
def test_confusion_is_readable_for_any_number_of_classes(classes):
    page = unescape(report(classes=classes))
    cells = len(re.findall(r"<td style=[^>]*>", page)) - 4  # the other heat map has 4
    assert cells == (classes**2 if classes <= MATRIX_CLASSES else 0)
    assert ("confuses most often" in page) == (classes > MATRIX_CLASSES)
    assert (f"The first {PAIRS} of {classes} pairs; confusions.csv has all of them." in page) == (classes == 300)
    assert (f"The first {CLASSES} of {classes}; classes.csv has all of them." in page) == (classes == 300)


def test_plain_table_has_a_line_per_classifier_and_aligned_columns():
    lines = format_table(RESULTS).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "teacher", "token", "mean"]
    top1 = ("top-1 %", "82.00", "73.90", "74.50")
    assert len({line.index(text) + len(text) for line, text in zip(lines, top1, strict=True)}) == 1
    assert lines[1].endswith("83.6   15.9       335") and lines[3].endswith("74.50    97.00")


def test_table_of_sizes_shows_the_joint_classifier():
    heads = (("class", 0.5), ("mean", 0.75))
    rows = [SizeResult("token", 16, size, name, share, 1.0) for size in (16, 32) for name, share in heads]
    lines = format_sizes([SizeResult("teacher", 8, 16, "class", 1.0, 1.0), *rows]).splitlines()
    assert lines == [
        "top-1 % at       16 px  32 px",
        "teacher (8 px)  100.00",
        "token (16 px)    75.00  75.00",
    ]


# numbers

shapes = st.tuples(st.integers(2, 4), st.integers(1, 30))
decisions = hnp.arrays(np.int64, shapes, elements=st.integers(0, 5))


@property_settings
@given(decisions)
def test_disagreement_is_symmetric_with_zero_diagonal(decided):
    table = disagreement({str(row): values for row, values in enumerate(decided)})
    shares = np.array([list(row.values()) for row in table.values()])
    assert (shares == shares.T).all() and not shares.diagonal().any()
    assert ((shares >= 0) & (shares <= 1)).all()


shapes = st.tuples(st.integers(1, 12), st.integers(2, 8))
scores = hnp.arrays(np.float32, shapes, elements=st.integers(-50, 50).map(float), unique=True)  # no ties


@property_settings
@given(scores, st.data())
def test_top_k_is_as_counted_one_by_one(values, data):
    samples, classes = values.shape
    labels = data.draw(hnp.arrays(np.int64, samples, elements=st.integers(0, classes - 1)))
    found = {k: top_k_accuracy(torch.from_numpy(values), torch.from_numpy(labels), k) for k in (1, 2, 5)}
    for k, share in found.items():
        best = [sorted(range(classes), key=lambda c: -row[c])[:k] for row in values]
        right = sum(label in few for label, few in zip(labels, best, strict=True))
        assert share == pytest.approx(right / samples, abs=1e-12)
    wrong = disagreement({"truth": labels, "model": values.argmax(1)})["truth"]["model"]
    assert wrong == pytest.approx(1 - found[1])


def test_mean_of_logits_and_sum_of_softmaxes_can_decide_differently():
    own, taught = torch.tensor([[4.0, 0.0, 3.0]]), torch.tensor([[0.0, 3.5, 3.0]])
    scores = classifiers((own, taught), distilled=True)
    assert list(scores) == ["class", "distillation", "mean", "softmax"]
    assert {name: int(values.argmax()) for name, values in scores.items()} == {
        "class": 0, "distillation": 1, "mean": 2, "softmax": 0,
    }  # fmt: skip


def test_one_head_is_one_classifier():
    logits = torch.eye(3)
    assert list(classifiers((logits, logits), distilled=False)) == ["class"]


def test_multiply_adds_count_attention():
    """196 * 768 D + 12 (12 T D^2 + 2 T^2 D) + 2 * 1000 D for D = 192, T = 198: 1.261e9."""
    model = build_student(Student(model="deit_tiny_distilled_patch16_224"), Recipe(), 1000, 224)
    assert multiply_adds(model, 224) == pytest.approx(1.261e9, rel=0.005)
    assert parameter_count(model.model) == 5_910_800


# the stage


def mini_config(work: Path):
    """Two classes of a few small pictures, and models that take no time."""
    plain = {"model": "deit_tiny_patch16_224", "distillation": "none"}
    quick = {"batch_size": 8, "ema_decay": None, "precision": "float32", "workers": 0}
    return resolve(
        {
            "name": "mini",
            "data": {
                "source": "folder", "train": str(work / "train"), "val": str(work / "val"),
                "shard_samples": 8, "workers": 1,
            },
            "recipe": {"size": 16, "group_size": 4, "repeats": 1, "block": 1},
            "teacher": {"model": "test_resnet", **quick},
            "teacher_logits": {
                "views": 2, "kind": "topk", "top_k": 1, "precision": "float32", "workers": 0,
            },
            "student": {"kwargs": {"patch_size": 8, "embed_dim": 12, "depth": 1}, **quick},
            "students": ["token", "plain"],
            "variants": {"token": {"distillation": "hard"}, "plain": plain},
            "finetune": {"from": "token", "size": 24, "views": 1, **quick},
            "evaluate": {"workers": 0, "throughput_seconds": 0, "batch_size": 4, "sizes": [16, 32]},
        },
        (),
        "mini",
    )  # fmt: skip


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Everything that evaluate reads, the models untrained; outputs lie in the current folder."""
    work, device = tmp_path_factory.mktemp("mini"), torch.device("cpu")
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 5)):
        for name in ("cat", "dog"):
            (work / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(noise.integers(0, 256, (20, 24, 3), np.uint8))
                image.save(work / split / name / f"{number}.png")
    config = mini_config(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        prepare.run(config)
        token, plain = (config.student_named(name) for name in config.students)
        models = {
            teacher_folder(config): build_teacher(config.teacher, 2),
            student_folder(config, "token"): build_student(token, config.recipe, 2, 16),
            student_folder(config, "plain"): build_student(plain, config.recipe, 2, 16),
            finetune_folder(config, "token"): build_student(token, config.recipe, 2, 24),
        }
        for folder, model in models.items():
            folder.mkdir(parents=True)
            save_weights(folder / "weights.safetensors", model.model)
        save_teacher(teacher_folder(config) / "weights.safetensors", config.teacher, models[teacher_folder(config)])
        teacher_logits.run(config, device)
        yield config, device


@pytest.fixture(scope="module")
def evaluated(mini) -> Path:
    """The folder of its evaluation."""
    evaluate.run(*mini)
    return evaluation_folder(mini[0]).absolute()


def test_evaluate_writes_metrics_that_a_second_run_repeats(mini, capsys):
    config, device = mini
    folder = evaluation_folder(config)
    same = (
        "metrics.json", "accuracy.csv", "comparison.csv", "classes.csv", "confusions.csv", "disagreement.csv",
        "details.json", "disagreement.png", "views.png", "curves.png", "calibration.csv", "token_cosine.csv", "reliability.png",
        "token_cosine.png",
    )  # fmt: skip
    first, second = [], []
    for written in (first, second):
        evaluate.run(config, device)
        written += [(folder / name).read_bytes() for name in same]
    assert first == second
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == ["teacher", "token", "plain", "token-finetuned"]
    two_heads = {"class", "distillation", "mean", "softmax", "parameters", "gmacs", "ece", "token_cosine", "validation"}
    assert two_heads == set(metrics["token-finetuned"])
    assert {"class", "parameters", "gmacs", "ece", "validation"} == set(metrics["plain"])
    assert metrics["token-finetuned"]["gmacs"] > metrics["token"]["gmacs"] > 0
    assert all(model["class"]["top5"] == 1 for model in metrics.values())  # of two classes
    rates = json.loads((folder / "throughput.json").read_text())
    assert all(rates[name]["images_per_second"] > 0 for name in metrics)
    pairs = (folder / "disagreement.csv").read_text().splitlines()
    assert pairs[0] == "first,second,share" and len(pairs) == 1 + 7 * 7
    wrong = float(next(line for line in pairs if line.startswith("truth,teacher,")).split(",")[2])
    assert wrong == pytest.approx(1 - metrics["teacher"]["class"]["top1"])
    page = unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert all(name in page for name in (*metrics, "test_resnet", "token distillation", "token-finetuned mean"))
    assert str(folder / "report.html") in capsys.readouterr().out


def test_tables_of_classes_agree_with_the_metrics(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    tables = {}
    for name in ("classes", "confusions", "comparison", "accuracy"):
        with open(evaluated / f"{name}.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    assert {row["class"]: row["images"] for row in tables["classes"]} == {"cat": "5", "dog": "5"}
    for model, own in metrics.items():
        mean = sum(float(row[model]) for row in tables["classes"]) / 2
        assert mean == pytest.approx(own.get("mean", own["class"])["top1"])
    students = [own.get("mean", own["class"])["top1"] for name, own in metrics.items() if name != "teacher"]
    correct = sum(int(row["images"]) for row in tables["confusions"] if row["label"] == row["prediction"])
    assert correct == round(10 * max(students)) and sum(int(row["images"]) for row in tables["confusions"]) == 10
    for row in tables["comparison"]:
        values = [metrics[row[side]] for side in ("first", "second")]
        first, second = (own.get("mean", own["class"])["top1"] for own in values)
        assert float(row["top1_difference"]) == pytest.approx(first - second)
    assert all(float(row["top1_low"]) <= float(row["top1"]) <= float(row["top1_high"]) for row in tables["accuracy"])


def test_details_are_shapes_and_disagreements_of_every_student(evaluated):
    details = json.loads((evaluated / "details.json").read_text())
    assert details.keys() == {"token", "plain", "token-finetuned"}
    assert {key: value for key, value in details["token"].items() if key != "disagreement"} == {
        "embed_dim": 12, "num_heads": 3, "depth": 1,
    }  # fmt: skip
    lines = (line.split(",") for line in (evaluated / "disagreement.csv").read_text().splitlines()[1:])
    share = {(first, second): float(value) for first, second, value in lines}
    token = details["token"]["disagreement"]
    assert token["class"] == {
        "teacher": share["token class", "teacher"], "undistilled": share["token class", "plain class"],
        "distillation": share["token class", "token distillation"], "mean": share["token class", "token mean"],
    }  # fmt: skip
    assert token["distillation"]["class"] == token["class"]["distillation"]
    assert details["plain"]["disagreement"] == {"class": {"teacher": share["plain class", "teacher"]}}


def test_calibration_and_token_cosines_are_in_the_metrics_and_in_tables(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    with open(evaluated / "calibration.csv", newline="") as file:
        bins = list(csv.DictReader(file))
    with open(evaluated / "token_cosine.csv", newline="") as file:
        layers = list(csv.DictReader(file))
    for name, own in metrics.items():
        filled = [row for row in bins if row["model"] == name and row["images"] != "0"]
        images = np.array([int(row["images"]) for row in filled])
        confidence, accuracy = (np.array([float(row[key]) for row in filled]) for key in ("confidence", "accuracy"))
        assert images.sum() == 10 and images @ accuracy / 10 == pytest.approx(own.get("mean", own["class"])["top1"])
        assert images @ np.abs(confidence - accuracy) / 10 == pytest.approx(own["ece"], abs=1e-6)
        found = [row for row in layers if row["model"] == name]
        assert [row["layer"] for row in found] == (["parameters", "input", "1", "norm"] if "mean" in own else [])
        assert not found or float(found[-1]["mean"]) == pytest.approx(own["token_cosine"], abs=1e-6)


def test_mistakes_are_the_wrong_images_of_highest_confidence(mini):
    config, _ = mini
    val = Index(index_path(config, "val"))
    labels = val.labels()
    confidence = np.linspace(0.5, 0.95, len(val), dtype=np.float32)
    guesses = Predictions(np.where(np.arange(len(val)) % 2, labels, 1 - labels), confidence)
    found = confident_mistakes(val, labels, guesses, 16, 0.875, count=3)
    wrong = [8, 6, 4]
    assert [each.confidence for each in found] == pytest.approx([confidence[row] for row in wrong])
    for each, row in zip(found, wrong, strict=True):
        shard, position = val.locate(row)
        assert each.thumbnail.caption == val.rows(shard)[position]["key"].decode()
        assert (each.label, each.prediction) == (val.classes[labels[row]], val.classes[1 - labels[row]])


def test_code_in_the_report_uses_no_head_that_was_not_trained(mini):
    config, _ = mini
    entry = next(entry for entry in list_entries(config) if entry.name == "token")
    assert entry.student
    untrained = dataclasses.replace(entry, student=entry.student.model_copy(update={"distillation": "none"}))
    codes = [loading_code(config, each).replace("photo.jpg", "photo.png") for each in (entry, untrained)]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save("photo.png")
    found = []
    for code in codes:
        scope: dict = {}
        exec(code, scope)
        model, picture = scope["model"], scope["picture"]
        with torch.inference_mode():
            tokens = model.forward_features(picture)
            found.append((scope["confidence"].item(), model.head(tokens[:, 0]).softmax(1).max().item()))
    assert found[1][0] == pytest.approx(found[1][1]) and found[0][0] != pytest.approx(found[0][1])


@pytest.mark.parametrize("name", ["plain", "token", "token-finetuned"])
def test_code_in_the_report_loads_the_model_and_classifies_a_picture(mini, tmp_path, monkeypatch, capsys, name):
    config, device = mini
    entry = next(entry for entry in list_entries(config) if entry.name == name)
    val = Index(index_path(config, "val"))
    evaluator = Evaluator(config, val, device)
    own = evaluator.evaluate(entry, evaluator.load(entry)).predictions
    expected = own["mean" if "mean" in own else "class"]
    code = loading_code(config, entry)
    for row in range(3):
        Image.fromarray(val.image(*val.locate(row))).save(tmp_path / "photo.png")
        exec(code.replace("photo.jpg", str(tmp_path / "photo.png")), {})
        shown, confidence = capsys.readouterr().out.split()
        assert shown == val.classes[expected.classes[row]]
        assert float(confidence) == pytest.approx(expected.confidence[row], abs=2e-3)


def test_a_size_that_patches_do_not_cover_is_refused_by_a_dry_run(mini):
    config, device = mini
    changed = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"sizes": [32, 19]})})
    with pytest.raises(UsageError, match=r"(?s)token with pictures of 19 px.*correct evaluate\.sizes"):
        evaluate.run(changed, device, dry_run=True)


def test_a_teacher_of_a_fixed_size_is_evaluated_at_no_other(mini, monkeypatch, capsys):
    config, device = mini
    changed = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"sizes": [24]})})
    evaluator, entry = Evaluator(changed, Index(index_path(config, "val")), device), list_entries(config)[0]
    assert [row.size for row in evaluator.size_results(entry)] == [24]
    fixed = build_teacher(config.teacher.model_copy(update={"model": "test_vit", "kwargs": {"img_size": 32}}), 2)
    monkeypatch.setattr(Evaluator, "load", lambda *_: fixed.eval())
    capsys.readouterr()
    assert evaluator.size_results(entry) == [] and "teacher: not evaluated at 24 px" in capsys.readouterr().out


def test_examples_come_from_the_first_shard_that_has_samples(in_tmp):
    write_shard(in_tmp / "0.tar", [])
    write_shard(in_tmp / "1.tar", [(f"{number}", "png", picture(number), number % 2) for number in range(4)])
    write_index(in_tmp / "index.json", str(in_tmp), ["a", "b"], [index_shard(str(in_tmp), f"{n}.tar") for n in range(2)])
    shown = training_examples(resolve({"recipe": {"size": 16, "group_size": 4}}, (), "test"), Index(in_tmp / "index.json"))
    assert len(shown) == 4 and {example.label for example in shown} == {"a", "b"}


def test_settings_and_training_time_come_from_configuration_and_log(mini, monkeypatch):
    config, _ = mini
    run = "c" * 32
    log = Log(state_folder(config, run) / "log.jsonl")
    for epoch in (1, 2):
        log.write("epoch", epoch, epoch=epoch, speed={"seconds": 100.4})
    metrics = student_folder(config, "plain") / "metrics.json"
    metrics.write_text(json.dumps({"run": run}))
    try:
        rows = {row.model: row for row in training_rows(config, list_entries(config))}
    finally:
        metrics.unlink()
        log.path.unlink()
    assert list(rows) == ["teacher", "token", "plain", "token-finetuned"]
    assert (rows["plain"].time, rows["token"].time) == ("3 min", "")
    assert (rows["plain"].objective, rows["token"].objective) == ("labels only", "hard distillation, α 0.5")
    assert (rows["plain"].lr, rows["plain"].batch_size) == (f"{5e-4 * 8 / 512:.3g}", "8")


@pytest.mark.parametrize(("metrics", "listed"), [({"run": "d" * 32}, True), ({"top1": 0.9}, False)])
def test_pretrained_teacher_has_training_settings_only_if_it_was_trained_further(mini, metrics, listed):
    config, _ = mini
    pretrained = config.model_copy(update={"teacher": config.teacher.model_copy(update={"weights": "some.pth"})})
    path = teacher_folder(config) / "metrics.json"
    kept = path.read_bytes() if path.exists() else None
    path.write_text(json.dumps(metrics))
    try:
        rows = training_rows(pretrained, list_entries(pretrained))
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)
    assert ("teacher" in [row.model for row in rows]) == listed


def test_report_says_when_it_was_written_and_by_which_commit(tmp_path, monkeypatch):
    origin = describe_report()["Report"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", origin["written"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert list(describe_report()["Report"]) == ["written"]


def test_accuracy_at_the_size_of_training_is_that_of_the_table(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    with open(evaluated / "sizes.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    assert {row["size"] for row in rows} == {"16", "32"} and {row["model"] for row in rows} == set(metrics)
    own = [row for row in rows if row["size"] == row["trained"]]
    assert own and all(float(row["top1"]) == metrics[row["model"]][row["classifier"]]["top1"] for row in own)


def test_a_model_tuned_onto_another_data_set_is_evaluated_without_teacher_or_store(mini, tmp_path):
    config, device = mini
    tuned = config.finetune.model_copy(update={"weights": "elsewhere.safetensors", "students": ["plain"]})
    alone = config.model_copy(update={"students": [], "finetune": tuned, "name": "transfer"})
    shutil.copytree(index_path(config, "train").parent.parent, index_path(alone, "train").parent.parent)
    model = build_student(alone.finetune_student("plain"), alone.recipe, 2, 24)
    finetune_folder(alone, "plain").mkdir(parents=True)
    save_weights(finetune_folder(alone, "plain") / "weights.safetensors", model.model)
    evaluate.run(alone, device)
    assert list(json.loads((evaluation_folder(alone) / "metrics.json").read_text())) == ["plain-finetuned"]
    page = (evaluation_folder(alone) / "report.html").read_text(encoding="utf-8")
    assert "teacher:" not in page and "elsewhere.safetensors at 24 px" in page


def test_examples_are_of_different_classes_as_far_as_there_are_any():
    assert shown_positions([5, 3, 2, 9, 7, 4], [0, 0, 1, 0, 2, 0]) == [5, 3, 2, 7]
    assert shown_positions([5, 3], [0, 0]) == [5, 3]


@pytest.mark.parametrize("block", [1, 30])
def test_examples_show_every_kind_of_mixing_of_the_first_block(block):
    recipe = Recipe(block=block, repeats=1, mix_prob=0.5)
    methods = [draw_mix(recipe, "000000.tar", 0, view, 64).method for view in range(block)]
    shown = shown_views(recipe, "000000.tar", 64, 40)
    assert len(shown) == 3 and shown == sorted({*shown})
    assert (shown == [0, 1, 2]) if block == 1 else ({methods[view] for view in shown} == {"none", "mixup", "cutmix"})
    assert shown_views(recipe, "000000.tar", 64, 2) == [0, 1]


def test_examples_come_with_the_predictions_of_the_store(mini):
    config, _ = mini
    index = Index(index_path(config, "train"))
    examples = training_examples(config, index, *evaluate.open_store(config, index))
    assert len(examples) == 3  # 12 images in 2 shards of 6: groups of 3
    assert all([view.number for view in example.views] == [0, 1] for example in examples)
    for view in (view for example in examples for view in example.views):
        assert view.prediction in ("cat", "dog") and 0.5 <= view.probability <= 1
        assert (view.method == "none") == bool((view.picture == view.mixed).all()) or view.lam > 0.99


def test_examples_from_a_store_of_classes_alone_show_no_probability(mini):
    config, _ = mini
    index = Index(index_path(config, "train"))
    store, manifest = evaluate.open_store(config, index)
    full, classes = (training_examples(config, index, store, manifest | {"kind": kind}) for kind in ("topk", "argmax"))
    predictions = [[view.prediction for example in each for view in example.views] for each in (full, classes)]
    assert predictions[0] == predictions[1]
    assert all(view.probability is None for example in classes for view in example.views)


def test_a_model_that_was_not_trained_is_named_with_its_command(mini, capsys):
    config, device = mini
    variants = config.variants | {"late": {"distillation": "none"}}
    untrained = config.model_copy(update={"students": ["token", "late"], "variants": variants})
    evaluate.run(untrained, device, dry_run=True)
    assert "4 models on 10 images" in capsys.readouterr().out
    with pytest.raises(PipelineError, match="pipeline train-student --student late"):
        evaluate.run(untrained, device)


def test_a_configuration_without_students_is_told_so(mini):
    config, device = mini
    with pytest.raises(UsageError, match="a student in `students` or `finetune.from`"):
        evaluate.run(config.model_copy(update={"students": [], "finetune": config.finetune.model_copy(update={"students": []})}), device)


def test_models_that_are_published_again_during_an_evaluation_are_not_taken_for_those_before(mini, monkeypatch):
    config, device = mini
    metrics, real, asked = evaluation_folder(config) / "metrics.json", evaluate.identify, []
    metrics.unlink(missing_ok=True)
    monkeypatch.setattr(evaluate, "identify", lambda *given: asked.append(None) or real(*given) | {"token": {"run": str(len(asked))}})
    with pytest.raises(PipelineError, match="published again during the evaluation: token"):
        evaluate.run(config, device)
    assert not metrics.exists()


def test_an_evaluation_that_fails_leaves_no_metrics(mini, monkeypatch):
    config, device = mini
    (evaluation_folder(config) / "metrics.json").unlink(missing_ok=True)
    monkeypatch.setattr(evaluate, "training_examples", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.run(config, device)
    assert not (evaluation_folder(config) / "metrics.json").exists()


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_weights_that_are_missing_or_damaged_are_named(mini, tmp_path, content):
    config, device = mini
    source = tmp_path / "w.safetensors"
    if content:
        source.write_bytes(content)
    with pytest.raises(PipelineError, match="w.safetensors"):
        evaluate.run_weights(config, device, str(source), None, 16)


def test_a_student_cannot_take_the_name_of_another_row():
    with pytest.raises(UsageError, match="must be none of class, images, teacher, truth"):
        resolve({"variants": {"hard": {}, "teacher": {}}}, (), "test")


def test_a_missing_store_is_an_error(mini, tmp_path):
    config, _ = mini
    index = Index(index_path(config, "train"))
    with pytest.raises(PipelineError, match="pipeline teacher-logits"):
        evaluate.open_store(config.model_copy(update={"name": "elsewhere"}), index)


DAMAGE = {"empty": b"", "bytes": b"\xff", "other": b"epoch,loss\n1,x\n", "gone": None}


@pytest.mark.parametrize(
    ("name", "damage"),
    [("teacher-logits/summary.json", damage) for damage in DAMAGE.values()]
    + [("teacher/curve.csv", damage) for damage in DAMAGE.values() if damage is not None],
)
def test_damaged_summary_or_curve_is_refused_before_anything_is_evaluated(mini, monkeypatch, name, damage):
    config, device = mini
    path = outputs(config) / name
    if name.endswith("curve.csv"):
        write_curve(path)
    kept = path.read_bytes()
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: pytest.fail("it computes"))
    try:
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(PipelineError, match=str(path)):
            evaluate.run(config, device)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("wrapped", ["safetensors", "pth"])
def test_weights_from_anywhere_are_evaluated_and_nothing_is_written(mini, tmp_path, capsys, wrapped):
    config, device = mini
    source = student_folder(config, "token") / "weights.safetensors"
    file = tmp_path / f"released.{wrapped}"
    if wrapped == "pth":
        torch.save({"model": read_weights(source)}, file)
    else:
        shutil.copy(source, file)
    before = sorted(Path(".").rglob("*"))
    # heads that were trained are told apart by the file, not by the configuration
    plain = config.model_copy(update={"student": config.student.model_copy(update={"distillation": "none"})})
    evaluate.run_weights(plain, device, str(file), None, 16)
    output = capsys.readouterr().out
    assert sorted(Path(".").rglob("*")) == before
    entry = next(entry for entry in list_entries(config) if entry.name == "token")
    evaluator = Evaluator(config, Index(index_path(config, "val")), device)
    rows = evaluator.evaluate(entry, evaluator.load(entry)).results
    printed = {line.split()[-6]: float(line.split()[-5]) for line in output.splitlines() if " class " in line}
    printed |= {line.split()[0]: float(line.split()[1]) for line in output.splitlines() if line.startswith(" ")}
    assert {row.classifier for row in rows} == {"class", "distillation", "mean", "softmax"}
    for row in rows:
        assert printed[row.classifier] == pytest.approx(100 * row.top1, abs=0.01)


def described_weights(config, folder: Path, **description) -> str:
    model = build_student(config.student_named("token"), config.recipe, 2, 16).model
    save_weights(folder / "described.safetensors", model, {DESCRIPTION: description})
    return str(folder / "described.safetensors")


def test_weights_of_another_normalization_are_refused_with_what_to_set(mini, tmp_path):
    config, device = mini
    same, other = ([value + shift for value in config.recipe.mean] for shift in (0, 0.125))
    evaluate.run_weights(config, device, described_weights(config, tmp_path, mean=same), None, 16)
    with pytest.raises(PipelineError, match=r"(?s)another normalization.*expected: recipe\.mean.*--set 'recipe\.mean="):
        evaluate.run_weights(config, device, described_weights(config, tmp_path, mean=other), None, 16)


@pytest.mark.parametrize(("heads", "shown"), [("class", False), ("mean", True)])
def test_a_head_that_was_not_trained_is_not_evaluated(mini, tmp_path, capsys, heads, shown):
    config, device = mini
    evaluate.run_weights(config, device, described_weights(config, tmp_path, heads=heads), None, 16)
    assert ("softmax" in capsys.readouterr().out) == shown


def test_weights_of_another_model_than_the_named_one_are_refused(mini, tmp_path):
    config, device = mini
    source = str(student_folder(config, "token") / "weights.safetensors")
    with pytest.raises(PipelineError, match="weights of another model"):
        evaluate.run_weights(config, device, source, "deit_small_distilled_patch16_224", 16)
    with pytest.raises(UsageError, match="such as deit"):
        evaluate.run_weights(config, device, source, "deit_smal_distilled_patch16_224", 16)


def test_weights_of_other_classes_than_those_of_validation_are_refused(mini, tmp_path):
    config, device = mini
    entry, val = next(each for each in list_entries(config) if each.name == "token"), Index(index_path(config, "val"))
    moved = dataclasses.replace(entry, folder=tmp_path)
    save_weights(moved.weights, load_entry(config, entry, val.classes, device).model, {DESCRIPTION: {"classes": val.classes[::-1]}})
    with pytest.raises(PipelineError, match="(?s)classes differ from the index's.*class 0 being"):
        load_entry(config, moved, val.classes, device)
    with pytest.raises(PipelineError, match="(?s)classes differ from the index's.*class 0 being"):
        evaluate.run_weights(config, device, str(moved.weights), None, 16)


def test_weights_of_another_run_than_the_metrics_next_to_them_are_refused(mini):
    config = mini[0] if isinstance(mini, tuple) else mini
    folder, model = student_folder(config, "plain"), build_student(config.student_named("plain"), config.recipe, 2, 16)
    before = (folder / "weights.safetensors").read_bytes()
    save_weights(folder / "weights.safetensors", model.model, {"run": "a" * 32})
    (folder / "metrics.json").write_text(json.dumps({"run": "b" * 32}))
    try:
        with pytest.raises(PipelineError, match="weights of another run"):
            evaluate.run(config, torch.device("cpu"))
    finally:
        (folder / "weights.safetensors").write_bytes(before)
        (folder / "metrics.json").unlink()
