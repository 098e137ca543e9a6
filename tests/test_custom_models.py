"""Models of one's own by dotted path: built, trained, identified by their source, described, exported."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_pretrained import BRIEF, offline_equals_online
from test_training import CPU, loaded

from pipeline.cli.dry_run import check
from pipeline.cli.main import main
from pipeline.common import code
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import dump
from pipeline.config.paths import external_path, outputs, student_folder, teacher_folder
from pipeline.config.schema import Config
from pipeline.models.build import CustomModel
from pipeline.models.description import load_model
from pipeline.models.provenance import teacher_architecture
from pipeline.models.weights import read_weights, save_weights
from pipeline.report.entries import list_entries, load_entry
from pipeline.report.settings import loading_code
from pipeline.training.identity import configured_finetune, configured_student, configured_teacher
from stages import finetune, prepare, teacher, teacher_logits, train_student

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.body(x).mean((2, 3)))

def build(num_classes, width=4):
    return Net(num_classes, width)

def ten(num_classes):
    return Net(10, 4)

def pair(num_classes):
    model = Net(num_classes, 4)
    model.forward = lambda x: (x, x)
    return model

def broken(num_classes):
    model = Net(num_classes, 4)
    model.forward = lambda x: x.no_such_method()
    return model

def nothing(num_classes):
    pass

number = 3
"""
PLAIN = "student.drop_path=0", "student.kwargs={width: 5}", "variants={hard: {}}", "students=[hard]", "finetune.drop_path=0"


def write(text: str = SOURCE) -> None:
    """Write the module `mine.nets` into the current folder, as a new process would find it."""
    Path("mine").mkdir(exist_ok=True)
    Path("mine/nets.py").write_text(text)
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
    code._imported.clear()


@pytest.fixture
def own(taught, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write()
    yield student()
    forget()


def student(*overrides: str, function: str = "build") -> Config:
    return loaded(*BRIEF, *PLAIN, f"student.model=mine.nets:{function}", *overrides)


def own_teacher(*overrides: str) -> Config:
    settings = "teacher.model=mine.nets:build", "teacher.kwargs={}"
    return loaded(*BRIEF, "variants={hard: {}}", "students=[hard]", *settings, *overrides)


def test_a_student_of_ones_own_is_distilled_and_fine_tuned_through_its_output(own):
    train_student.run(own, CPU, "hard")
    weights = read_weights(student_folder(own, "hard") / "weights.safetensors")
    assert weights["classifier.weight"].shape == (3, 5)
    finetune.run(own, CPU, "hard", teacher="online")


def test_the_same_seed_gives_the_same_weights(own):
    first, second = (train_student.build_student(own.student, own.recipe, 3, 16).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_stored_predictions_of_a_teacher_of_ones_own_are_the_online_ones(own):
    config = own_teacher()
    teacher.run(config, CPU)
    offline_equals_online(config)


def test_weights_of_a_model_of_ones_own_are_used_as_they_are(own):
    source = CustomModel(code.import_function("mine.nets:build", "model")(3), (0, 0, 0), (1, 1, 1), "mine.nets:build", {}, 3)
    save_weights(Path("own.safetensors"), source.model)
    config = own_teacher("teacher.weights=own.safetensors")
    check(config, "teacher")
    teacher.run(config, CPU)
    assert "run" not in json.loads((teacher_folder(config) / "metrics.json").read_text())


# identity


def test_a_changed_source_is_another_model(own):
    config = own_teacher()

    def described() -> list[dict]:
        return [
            configured_student(own, own.student, "index"), configured_finetune(own, own.student, "index"),
            configured_teacher(config, "index"), teacher_architecture(config.teacher),
        ]  # fmt: skip

    first = described()
    write(SOURCE)
    assert first == described()
    write(SOURCE + "# another comment\n")
    assert all(was != now for was, now in zip(first, described(), strict=True))
    assert all("code" not in json.dumps(part) for part in (configured_student(loaded(), loaded().student, "index"),))


def test_results_of_a_changed_source_are_not_taken_for_the_new_ones(own):
    config, store = own_teacher(), str(next(Path("work/stores").glob("*.zarr")))
    teacher.run(config, CPU)
    train_student.run(own, CPU, "hard", store=store)  # of the teacher before
    first = json.loads((student_folder(own, "hard") / "metrics.json").read_text())["run"]
    write(SOURCE.replace("nn.ReLU", "nn.Sigmoid"))
    with pytest.raises(PipelineError, match="(?s)another configuration.*code"):
        teacher_logits.run(config, CPU)
    with pytest.raises(PipelineError, match="(?s)the source that it was trained with.*mine/nets.py"):
        load_model(student_folder(own, "hard") / "weights.safetensors", own.custom_models)
    (entry,) = [each for each in list_entries(own) if each.name == "hard"]
    with pytest.raises(PipelineError, match="weights of a model whose source has changed"):
        load_entry(own, entry, ["cat", "dog", "eel"], CPU)
    train_student.run(own, CPU, "hard", store=store)
    assert first != json.loads((student_folder(own, "hard") / "metrics.json").read_text())["run"]
    load_entry(own, entry, ["cat", "dog", "eel"], CPU)


def test_a_source_that_is_edited_during_training_is_not_the_one_that_is_published(own):
    config = own_teacher()
    code.import_function("mine.nets:build", "model")
    before = teacher_architecture(config.teacher)
    Path("mine/nets.py").write_text(SOURCE + "# edited meanwhile\n")
    assert teacher_architecture(config.teacher) == before
    forget()
    assert teacher_architecture(config.teacher) != before


def test_prepare_records_the_source_for_dvc(own):
    prepare.run(own)
    recorded = external_path(own).read_bytes()
    assert json.loads(recorded) == {"mine.nets:build": code.source_digest("mine.nets:build")}
    write(SOURCE + "\n")
    prepare.run(own)
    assert external_path(own).read_bytes() != recorded
    prepare.run(loaded())
    assert json.loads(external_path(own).read_bytes()) == {}


def test_prepare_records_local_weights_for_dvc(taught):
    member = "{weights: member.safetensors, model: regnety_002}"
    names = "student.weights=s.pth", "finetune.weights=f.pth", f"teacher.ensemble=[{member}]"
    config = loaded("teacher.weights=regnety_002.pycls_in1k", *names)
    found = []
    for content in (None, b"a", b"b"):
        if content:
            Path("member.safetensors").write_bytes(content)
        prepare.run(config, quick=True)
        found.append(json.loads(external_path(config).read_bytes()))
    assert all(digests.keys() == {"s.pth", "f.pth", "member.safetensors"} for digests in found)
    assert found[0]["member.safetensors"] is None
    assert len({digests["member.safetensors"] for digests in found}) == 3


# out of the pipeline


def test_a_file_of_weights_alone_does_not_get_a_function_imported(own):
    train_student.run(own, CPU, "hard")
    path = student_folder(own, "hard") / "weights.safetensors"
    forget()
    with pytest.raises(UsageError, match="a function that the configuration names too"):
        load_model(path)
    assert "mine.nets" not in sys.modules
    model, description, _ = load_model(path, own.custom_models)
    assert description.model == "mine.nets:build" and description.code and model(torch.zeros(2, 3, 16, 16))[0].shape == (2, 3)


@pytest.mark.slow
def test_a_model_of_ones_own_is_exported_but_not_to_timm(own):
    train_student.run(own, CPU, "hard")
    Path("params.yaml").write_text(dump(own))
    done = CliRunner().invoke(main, ["export", "--student", "hard", "--format", "torch"])
    assert done.exit_code == 0 and "100 % of" in done.output and (outputs(own) / "export/hard/model.pt2").exists()
    done = CliRunner().invoke(main, ["export", "--student", "hard", "--format", "timm"])
    assert done.exit_code == 2 and "mine.nets:build" in done.output


def test_the_reports_code_loads_a_model_of_ones_own(own):
    text = loading_code(own, list_entries(own)[1])
    assert "from mine.nets import build\n" in text and "model = build(num_classes=len(classes), width=5)" in text


# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["student.model=nowhere.nets:build"], "(?s)a Python file of the module nowhere.nets.*current folder"),
        (["student.model=mine.nets:bild"], r"(?s)a function bild in .*nets.py"),
        (["student.model=mine.nets:number"], "(?s)a function number.*found: +3"),
        (["student.model=mine.nets:nothing", "student.kwargs={}"], "(?s)a torch.nn.Module.*found: +NoneType"),
        (["student.kwargs={depth: 2}"], r"(?s)build\(num_classes=3, \*\*{'depth': 2}\).*unexpected keyword"),
        (["student.model=mine.nets:ten", "student.kwargs={}"], r"(?s)\(images, 3\).*found: +shape \(1, 10\)"),
        (["student.model=mine.nets:pair", "student.kwargs={}"], "(?s)output of model 'mine.nets:pair'.*found: +tuple"),
        (["student.model=mine.nets:broken", "student.kwargs={}"], "(?s)mine.nets:broken with pictures of 16 px.*no_such"),
        (["student.drop_path=0.1"], "(?s)drop_path: 0 with a custom model.*pass what the function takes in kwargs"),
    ],
)
def test_a_function_that_does_not_fit_is_refused_in_a_dry_run_too(own, changes, message):
    config = student(*changes)
    with pytest.raises(UsageError, match=message):
        check(config, "train-student")
    with pytest.raises(UsageError, match=message):
        train_student.run(config, CPU, "hard")


def test_a_teachers_output_is_checked_in_a_dry_run(own):
    with pytest.raises(UsageError, match=r"\(images, 3\)"):
        check(own_teacher("teacher.model=mine.nets:ten"), "teacher")


def test_a_module_that_fails_is_named_with_its_error(own):
    write("import no_such_library\n")
    with pytest.raises(UsageError, match="(?s)nets.py.*ModuleNotFoundError: No module named 'no_such_library'"):
        check(own, "train-student")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.weights=deit_tiny_patch16_224.fb_in1k"], "weights in a local file with a custom model"),
        (["student.kwargs={num_classes: 3}"], "num_classes, which is passed anyway"),
        (["student.model=hf-hub:timm/x"], "mypackage.models:build"),
        (["student.model=a/b:build"], "mypackage.models:build"),
    ],
)
def test_settings_that_make_no_sense_with_a_model_of_ones_own_are_refused(own, overrides, message):
    with pytest.raises(UsageError, match=message):
        student(*overrides)
