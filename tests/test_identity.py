"""What a result depends on is in its identity: another teacher is another store, and another run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_training import CPU, Stop, loaded

from pipeline.cli.find_store import find_configured_store
from pipeline.common.errors import NotReady, PipelineError, UsageError
from pipeline.config.params import resolve
from pipeline.config.paths import index_path, student_folder, teacher_folder, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import store_spec
from pipeline.models.build import build_student, build_teacher
from pipeline.models.ensemble import load_members
from pipeline.models.pretrained import load_pretrained
from pipeline.models.provenance import teacher_architecture
from pipeline.models.teacher import describe_teacher, load_teacher, save_teacher
from pipeline.models.weights import read_saved_weights, read_weights, save_weights, weights_hash
from pipeline.report.entries import list_entries
from pipeline.shards.index import Index
from pipeline.training import identity
from pipeline.training.identity import configured_runs, configured_student, is_run_of, used_other_predictions
from pipeline.training.origin import require_student, require_teacher
from pipeline.training.teachers import create_teacher
from pipeline.training.trainer import Trainer
from stages import evaluate, finetune, teacher, teacher_logits, train_student

BRIEF = "student.epochs=1", "student.eval_epochs=1"
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 24}


@pytest.fixture
def told(capsys):
    """Where a dry run would put things: `told(run, ...)` gives the last folder that it names."""

    def call(run, *arguments, **options) -> str:
        capsys.readouterr()
        run(*arguments, **options, dry_run=True)
        return re.findall(r"work/(?:state|stores)/\S+", capsys.readouterr().out)[-1]

    return call


def publish_teacher(config: Config, purpose: str = "train-student", seed: int | None = 0) -> None:
    """A teacher of the configured function with fresh weights of a seed, or with those that it has, as if published so."""
    folder = teacher_folder(config, purpose)
    model = build_teacher(config.teacher.model_copy(update={"seed": seed or 0}), 3)
    if seed is None:
        model.model.load_state_dict(read_weights(folder / "weights.safetensors"))
    save_teacher(folder / "weights.safetensors", config.teacher, model)
    metrics = json.loads((folder / "metrics.json").read_text()) | {"architecture": teacher_architecture(config.teacher)}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def training_index() -> Index:
    return Index(index_path(loaded(), "train"))


# the teacher in the loop


def test_a_student_of_another_online_teacher_is_trained_anew(taught):
    config, weights = loaded(*BRIEF), student_folder(taught, "hard") / "weights.safetensors"
    train_student.run(config, CPU, "hard", teacher="online")
    first = read_weights(weights)
    publish_teacher(config, seed=5)
    train_student.run(config, CPU, "hard", teacher="online")
    second = read_weights(weights)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_another_online_teacher_is_another_fine_tuning(taught, told):
    config = loaded(*BRIEF)
    train_student.run(config, CPU, "hard")
    first = told(finetune.run, config, CPU, "hard", teacher="online")
    assert first == told(finetune.run, config, CPU, "hard", teacher="online")
    publish_teacher(config, "finetune", seed=5)
    assert first != told(finetune.run, config, CPU, "hard", teacher="online")


@pytest.mark.parametrize(
    "change", ["teacher_logits.precision=bfloat16", "teacher.mean=[0.5, 0.5, 0.5]", "teacher.kwargs.output_stride=32"]
)
def test_an_online_teacher_that_answers_otherwise_is_another_run(taught, told, change):
    first = told(train_student.run, taught, CPU, "hard", teacher="online")
    publish_teacher(loaded(change))
    assert first != told(train_student.run, loaded(change), CPU, "hard", teacher="online")


# stores


@pytest.mark.parametrize(
    "change",
    ["teacher.kwargs.output_stride=32", "teacher.mean=[0.5, 0.5, 0.5]", "teacher.std=[0.5, 0.5, 0.5]"],
)
def test_the_same_weights_in_another_function_fill_another_store(taught, told, change):
    first, changed = told(teacher_logits.run, taught, CPU), loaded(change)
    publish_teacher(changed, seed=None)
    assert first != told(teacher_logits.run, changed, CPU)


def test_a_teacher_that_sees_another_size_fills_another_store(taught, told):
    stores = [
        told(teacher_logits.run, loaded(*change), CPU, "finetune") for change in ([], ["finetune.teacher_size=16"])
    ]
    assert stores[0] != stores[1]
    assert stores[0] == told(teacher_logits.run, loaded("finetune.teacher_size=24"), CPU, "finetune")


def test_a_published_teacher_is_not_taken_for_another_function_of_the_same_weights(taught):
    with pytest.raises(PipelineError, match=r"(?s)kwargs.output_stride: 8, 32.*run: pipeline teacher "):
        teacher_logits.run(loaded("teacher.kwargs.output_stride=32"), CPU)


def check_for_evaluation(config: Config, name: str) -> None:
    """What `evaluate` checks of one model."""
    evaluate.require_models(config, [entry for entry in list_entries(config) if entry.name == name], training_index())


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (stage, change)
        for stage in ("teacher-logits", "train-student", "train-student online", "teacher-finetune", "evaluate")
        for change in ("teacher.lr=0.5", "teacher.seed=7", "recipe.hflip=0.25")
        if (stage, change) != ("train-student", "recipe.hflip=0.25")  # the store's recipe is refused before
    ],
)
def test_a_teacher_that_was_trained_otherwise_is_not_used(taught, stage, change):
    changed = loaded(change)
    named = change.removeprefix("teacher.").partition("=")[0] if change.startswith("teacher") else "another recipe"
    with pytest.raises(NotReady, match=rf"(?s)another configuration.*{named}.*run: pipeline teacher "):
        {
            "teacher-logits": lambda: teacher_logits.run(changed, CPU),
            "train-student": lambda: create_teacher(changed, changed.student_named("hard"), "train-student", training_index(), CPU),
            "train-student online": lambda: train_student.run(changed, CPU, "hard", teacher="online"),
            "teacher-finetune": lambda: teacher.run(changed, CPU, "finetune"),
            "evaluate": lambda: check_for_evaluation(changed, "teacher"),
        }[stage]()


def test_what_does_not_change_a_teacher_does_not_make_it_another(taught):
    teacher_logits.run(loaded("teacher.min_top1=0", "teacher.eval_epochs=1", "teacher.workers=1", "student.lr=0.5"), CPU)


@pytest.mark.parametrize("change", ["variants.hard.lr=0.5", "student.seed=7"])
def test_a_student_that_was_trained_otherwise_is_neither_evaluated_nor_fine_tuned(taught, change):
    train_student.run(taught, CPU, "hard")
    changed = loaded(change, "students=[hard]", "finetune.from=[hard]")
    named = change.partition("=")[0].rpartition(".")[2]
    for use in (lambda: finetune.run(changed, CPU, "hard"), lambda: check_for_evaluation(changed, "hard")):
        with pytest.raises(NotReady, match=rf"(?s)student of another configuration.*student.{named}.*train-student --student hard"):
            use()
    check_for_evaluation(loaded("student.workers=1"), "hard")


def test_a_student_of_another_store_than_the_published_one_is_not_evaluated(taught):
    train_student.run(taught, CPU, "hard")
    manifest = teacher_logits_folder(taught, "train-student") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "0" * 32}))
    with pytest.raises(NotReady, match=f"trained from the store {'0' * 32}"):
        require_student(taught, training_index().fingerprint, "hard")


def test_a_student_of_other_predictions_than_the_published_ones_is_not_evaluated(taught):
    config = loaded("teacher_logits.kind=argmax", "students=[hard]")
    teacher_logits.run(config, CPU)
    train_student.run(config, CPU, "hard")
    path = teacher_logits_folder(config, "train-student") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"units": {}}))
    with pytest.raises(NotReady, match="(?s)trained from the published predictions, as argmax.*train-student --student hard"):
        require_student(config, training_index().fingerprint, "hard")


@pytest.mark.parametrize(
    ("kind", "manifest", "differ"),
    [
        ("topk", {}, True),
        ("dense", {}, False),
        ("dense", {"kind": "dense", "views": 8, "units": {}}, True),
        ("dense", {"kind": "argmax", "views": 8, "units": {}}, False),  # the units of another kind are others anyway,
        ("dense", {"kind": "dense", "views": 4, "units": {}}, False),  # and those of another number of views
        ("dense", {"kind": "argmax", "views": 8, "units": {}, "argmax_units": "v"}, False),
    ],
)
def test_predictions_are_compared_by_kind_and_by_the_units_of_a_manifest_of_the_same_kind_and_views(kind, manifest, differ):
    described = {"dependencies": {"teacher": {"store": "s", "kind": "dense", "units": "u"}}}
    assert used_other_predictions(described, kind, 8, manifest) == differ


@pytest.mark.parametrize(("argmax", "differ"), [({"argmax_units": "v"}, True), ({"argmax_units": "u"}, False), ({}, False)])
def test_the_argmax_that_a_student_read_is_compared_with_that_of_a_store_of_every_kind(argmax, differ):
    described = {"dependencies": {"teacher": {"store": "s", "kind": "argmax", "units": "u"}}}
    assert used_other_predictions(described, "argmax", 8, {"kind": "dense", "views": 8, "units": {}} | argmax) == differ


def test_a_student_of_the_argmax_of_another_dense_store_is_not_evaluated(taught):
    train_student.run(taught, CPU, "hard")
    require_student(taught, training_index().fingerprint, "hard")
    path = teacher_logits_folder(taught, "train-student") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"argmax_units": "0" * 32}))
    with pytest.raises(NotReady, match="trained from the published predictions, as argmax"):
        require_student(taught, training_index().fingerprint, "hard")


def test_a_manifest_without_a_fingerprint_of_the_argmax_is_accepted(taught):
    path = teacher_logits_folder(taught, "train-student") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["argmax_units"]
    path.write_text(json.dumps(manifest))
    train_student.run(taught, CPU, "hard")
    require_student(taught, training_index().fingerprint, "hard")


def test_a_student_with_the_teacher_in_the_loop_used_no_other_predictions():
    assert not used_other_predictions({"dependencies": {"teacher": {"online": {}}}}, "topk", 8, {})


def test_a_fine_tuned_student_is_not_evaluated_when_the_student_was_trained_anew(taught):
    tuned = "finetune.from=[hard]", "finetune.epochs=1", "students=[hard]"
    train_student.run(loaded(*BRIEF, *tuned), CPU, "hard")
    finetune.run(loaded(*BRIEF, *tuned), CPU, "hard", teacher="online")
    check_for_evaluation(loaded(*BRIEF, *tuned), "hard-finetuned")
    anew = loaded(*BRIEF, *tuned, "student.seed=7")
    train_student.run(anew, CPU, "hard")
    with pytest.raises(NotReady, match="(?s)student of another configuration.*from the weights.*finetune --student hard"):
        check_for_evaluation(anew, "hard-finetuned")


@pytest.mark.parametrize(("key", "name"), [("student.weights", "hard"), ("finetune.weights", "hard-finetuned")])
def test_a_student_is_not_evaluated_when_the_file_it_started_from_was_replaced(taught, key, name):
    config = loaded(*BRIEF, "finetune.from=[hard]", "finetune.epochs=1", "students=[hard]", f"{key}=start.safetensors")
    for seed in (1, 2):
        start = build_student(config.student_named("hard").model_copy(update={"seed": seed}), config.recipe, 3, 16)
        save_weights(Path("start.safetensors"), start.model)
        if seed == 1:
            train_student.run(config, CPU, "hard")
            finetune.run(config, CPU, "hard", teacher="online")
            check_for_evaluation(config, name)
    with pytest.raises(NotReady, match="(?s)student of another configuration.*trained from the weights sha256:"):
        check_for_evaluation(config, name)
    Path("start.safetensors").unlink()
    check_for_evaluation(config, name)  # a file that is gone says nothing


def test_a_student_of_other_views_is_refused_with_their_number(taught):
    train_student.run(taught, CPU, "hard")
    with pytest.raises(NotReady, match=r"views: 8, 12 \(trained, configured\)"):
        require_student(loaded("teacher_logits.views=12"), training_index().fingerprint, "hard")


def test_a_second_teacher_that_was_not_adapted_is_refused_where_one_is_configured(taught):
    require_teacher(taught, training_index().fingerprint, "finetune")
    with pytest.raises(NotReady, match="(?s)teacher_finetune.epochs 1.*not trained further.*run: pipeline teacher --for finetune"):
        teacher_logits.run(loaded("teacher_finetune.epochs=1"), CPU, "finetune")


def test_a_second_teacher_of_an_earlier_version_is_accepted(taught):
    tuned = loaded("teacher_finetune.epochs=1", "teacher_finetune.batch_size=8", "teacher_finetune.workers=0")
    teacher.run(tuned, CPU, "finetune")
    path = teacher_folder(tuned, "finetune") / "weights.safetensors"
    _, about = read_saved_weights(path)
    model = load_teacher(tuned, training_index().classes, CPU, "finetune")
    save_teacher(path, tuned.teacher, model, about["description"])
    require_teacher(tuned, training_index().fingerprint, "finetune")


@pytest.mark.parametrize("change", ["teacher.mean=[0.5, 0.5, 0.5]", "teacher_logits.precision=bfloat16"])
@pytest.mark.parametrize("use", ["train-student", "evaluate"])
def test_a_store_of_a_teacher_that_ran_otherwise_than_configured_is_refused(taught, change, use):
    changed = loaded(change)
    with pytest.raises(PipelineError, match=r"run: pipeline teacher"):
        if use == "evaluate":
            require_teacher(changed, training_index().fingerprint)
            evaluate.open_store(changed, training_index())
        else:
            create_teacher(changed, changed.student_named("hard"), "train-student", training_index(), CPU)


@pytest.mark.parametrize("use", ["train-student", "evaluate", "publish"])
def test_a_store_of_a_teacher_whose_weights_are_gone_is_used_only_as_configured(taught, use, tmp_path):
    shutil.rmtree(teacher_folder(taught))  # as DVC does before it trains another

    def try_with(config: Config) -> None:
        if use == "publish":
            find_configured_store(config, store_spec(config, "train-student"))
        elif use == "evaluate":
            evaluate.open_store(config, training_index())
        else:
            create_teacher(config, config.student_named("hard"), "train-student", training_index(), CPU)

    try_with(taught)
    try_with(loaded("teacher.workers=1"))
    with pytest.raises(NotReady, match="(?s)store of another teacher.*weights are gone.*pipeline teacher, then pipeline teacher-logits"):
        try_with(loaded("teacher.seed=7"))


def test_a_new_teacher_is_not_evaluated_beside_the_students_of_the_former_one(taught):
    store, _ = evaluate.open_store(taught, training_index())
    teacher.run(loaded("teacher.seed=7"), CPU)
    with pytest.raises(UsageError, match=f"{store.path}: its teacher"):
        evaluate.open_store(loaded("teacher.seed=7"), training_index())


@pytest.mark.parametrize("use", ["train-student", "evaluate"])
def test_a_store_of_another_function_of_the_same_weights_is_refused(taught, use):
    changed = loaded("teacher.mean=[0.5, 0.5, 0.5]")
    weights = teacher_folder(taught) / "weights.safetensors"
    before = read_weights(weights)
    publish_teacher(changed, seed=None)
    after = read_weights(weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UsageError, match=r"(?s)its teacher.*mean: .*0\.485.*0\.5.*run: pipeline teacher-logits"):
        if use == "evaluate":
            evaluate.open_store(changed, training_index())
        else:
            create_teacher(changed, changed.student_named("hard"), "train-student", training_index(), CPU)


def test_a_store_of_a_teacher_with_other_class_names_is_refused(taught):
    path = teacher_folder(taught) / "weights.safetensors"
    _, about = read_saved_weights(path)
    model = load_teacher(taught, training_index().classes, CPU)
    save_teacher(path, taught.teacher, model, about["description"] | {"classes": ["b", "a", "c"]})
    with pytest.raises(PipelineError, match=r"(?s)classes.*run: pipeline teacher, then pipeline teacher-logits"):
        create_teacher(taught, taught.student_named("hard"), "train-student", training_index(), CPU)


def test_another_function_of_the_same_weights_is_fine_tuned_anew(taught, told):
    tuned = "teacher_finetune.epochs=1", "teacher_finetune.batch_size=8", "teacher_finetune.workers=0"
    first, changed = told(teacher.run, loaded(*tuned), CPU, "finetune"), loaded(*tuned, "teacher.std=[0.5, 0.5, 0.5]")
    publish_teacher(changed, seed=None)
    assert first != told(teacher.run, changed, CPU, "finetune")


# teachers with two heads, or of a fixed input size


def vit_teacher(size: str = "24") -> Config:
    """A distilled ViT that takes pictures of 24 px alone, read from weights; the recipe's have 16."""
    changes = ["teacher.model=deit_tiny_distilled_patch16_224", "teacher.weights=vit.safetensors"]
    changes += [f"teacher.size={size}", "teacher.crop=1.0"]
    config = loaded(*BRIEF, *changes)
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"kwargs": VIT})})
    save_weights(Path("vit.safetensors"), build_teacher(config.teacher, 3).model)
    return config


def test_a_teacher_of_a_fixed_input_size_answers_about_the_recipes_pictures(taught):
    config = vit_teacher()
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    train_student.run(config, CPU, "hard")
    offline = read_weights(student_folder(config, "hard") / "weights.safetensors")
    train_student.run(config, CPU, "hard", teacher="online")
    online = read_weights(student_folder(config, "hard") / "weights.safetensors")
    assert all(torch.equal(offline[name], online[name]) for name in offline)


def test_a_teacher_that_does_not_take_the_recipes_size_is_told_what_to_set(taught):
    with pytest.raises(UsageError, match=r"(?s)the teacher with pictures of 16 px.*24.*set teacher\.size"):
        teacher.run(vit_teacher("null"), CPU)


def test_a_size_of_its_own_is_refused_for_a_teacher_that_is_trained_here(taught):
    with pytest.raises(UsageError, match=r"teacher\.size must be null without teacher\.weights"):
        loaded("teacher.size=24")


def test_a_teachers_identity_tells_that_both_heads_answer(taught):
    distilled, plain = vit_teacher().teacher, taught.teacher
    assert describe_teacher(distilled, build_teacher(distilled, 3), 24)["head"] == "mean"
    assert describe_teacher(plain, build_teacher(plain, 3), 24)["head"] == "class"


def test_a_change_of_what_the_same_weights_predict_is_another_teacher(taught, monkeypatch):
    model = build_teacher(taught.teacher, 3)
    before = describe_teacher(taught.teacher, model, 24)
    monkeypatch.setattr("pipeline.models.teacher.PREDICTIONS_VERSION", 2)
    assert describe_teacher(taught.teacher, model, 24) == before | {"predictions_version": 2}


# a network with batch norm: the teacher, as it is trained here


NETWORK = "teacher.epochs=2", "teacher.drop_path=0.1", "teacher.checkpoint_minutes=0.0", "teacher.ema_decay=0.9"


def trained_teacher(*overrides: str, anew: bool = True) -> dict[str, torch.Tensor]:
    if anew:
        shutil.rmtree("work/state")
    config = loaded(*NETWORK, *overrides)
    teacher.run(config, CPU)
    return read_weights(teacher_folder(config) / "weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def stopped_at(step: int, monkeypatch):
    """Training ends before that step, as if it were killed there."""
    real = Trainer.train_step

    def stopping(self, *given):
        if self.step == step:
            raise Stop
        return real(self, *given)

    monkeypatch.setattr(Trainer, "train_step", stopping)


@pytest.mark.parametrize("at", [3, 7])
def test_a_network_with_batch_norm_that_stops_and_goes_on_ends_with_the_same_weights(taught, monkeypatch, at):
    expected = trained_teacher()
    assert any(name.endswith("running_var") for name in expected)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopped_at(at, patch)
        trained_teacher()
    assert same(trained_teacher(anew=False), expected)


def test_workers_change_nothing_for_a_network_with_batch_norm(taught):
    assert same(trained_teacher(), trained_teacher("teacher.workers=2"))


@pytest.mark.parametrize("tuned", [False, True], ids=["trained", "fine-tuned"])
def test_accumulation_makes_another_run_of_a_network_with_batch_norm(taught, told, tuned):
    section, purpose = ("teacher_finetune", "finetune") if tuned else ("teacher", "train-student")
    settings = f"{section}.epochs=1", f"{section}.batch_size=8"
    whole = told(teacher.run, loaded(*settings), CPU, purpose)
    assert whole == told(teacher.run, loaded(*settings, f"{section}.log_steps=7"), CPU, purpose)
    assert whole != told(teacher.run, loaded(*settings, f"{section}.accumulation=2"), CPU, purpose)


def test_a_network_with_batch_norm_of_another_accumulation_is_not_used(taught):
    settings = "teacher.epochs=1", "teacher.batch_size=8"
    teacher.run(loaded(*settings), CPU)
    require_teacher(loaded(*settings), training_index().fingerprint)
    with pytest.raises(NotReady, match=r"accumulation: 1, 2 \(trained, configured\)"):
        require_teacher(loaded(*settings, "teacher.accumulation=2"), training_index().fingerprint)


def test_accumulation_makes_no_other_run_of_a_vit(taught, told):
    whole = told(train_student.run, taught, CPU, "hard")
    assert whole == told(train_student.run, loaded("student.accumulation=2"), CPU, "hard")
    train_student.run(taught, CPU, "hard")
    require_student(loaded("student.accumulation=2"), training_index().fingerprint, "hard")


def test_a_network_with_batch_norm_does_not_go_on_with_another_number_of_ranks(taught, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopped_at(3, patch)
        trained_teacher()
    monkeypatch.setattr("pipeline.training.run.world_size", lambda: 2)
    with pytest.raises(PipelineError, match=r"ranks: 1, 2"):
        trained_teacher(anew=False)


def test_a_vit_goes_on_with_another_number_of_ranks(taught, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopped_at(3, patch)
        train_student.run(taught, CPU, "none")
    monkeypatch.setattr("pipeline.training.run.world_size", lambda: 2)
    train_student.run(taught, CPU, "none")


# the configuration's part


def test_run_json_of_every_training_stage_is_recognised_by_its_configuration(taught):
    tuned = "teacher_finetune.epochs=1", "teacher_finetune.batch_size=8", "teacher_finetune.workers=0"
    config = loaded(*BRIEF, *tuned, "finetune.epochs=1")
    shutil.rmtree("work/state")
    stages = {
        "teacher": lambda: teacher.run(loaded("teacher.epochs=1"), CPU),
        "teacher-finetune": lambda: teacher.run(config, CPU, "finetune"),
        "train-student@hard": lambda: train_student.run(config, CPU, "hard"),
        "finetune@hard": lambda: finetune.run(config, CPU, "hard", teacher="online"),
    }
    for stage, run_stage in stages.items():
        before = set(Path("work/state").glob("*"))
        run_stage()
        (state,) = set(Path("work/state").glob("*")) - before
        described = json.loads((state / "run.json").read_text())
        configured = configured_runs(loaded("teacher.epochs=1") if stage == "teacher" else config, described["index"])
        assert [name for name, run in configured.items() if is_run_of(run, described)] == [stage]


def test_runs_of_other_views_or_of_another_version_of_the_training_are_not_recognised(taught, monkeypatch):
    train_student.run(taught, CPU, "hard")
    described = next(json.loads(path.read_text()) for path in Path("work/state").glob("*/run.json") if "student" in path.read_text())
    own = lambda config: configured_runs(config, described["index"])["train-student@hard"]  # noqa: E731
    assert is_run_of(own(taught), described)
    assert not is_run_of(own(loaded("teacher_logits.views=12")), described)
    monkeypatch.setattr(identity, "TRAINING_VERSION", 0)
    assert not is_run_of(own(taught), described)
    del described["dependencies"]  # as earlier versions wrote it
    assert is_run_of(own(taught), described)


def test_a_teacher_of_given_weights_names_no_run_but_its_weights(taught):
    config = vit_teacher()
    teacher.run(config, CPU)
    metrics = json.loads((teacher_folder(config) / "metrics.json").read_text())
    assert "run" not in metrics
    assert metrics["weights"] == weights_hash(load_teacher(config, Index(index_path(config, "train")).classes, CPU).model)


def test_a_teacher_of_other_classes_is_refused_although_there_are_as_many(taught):
    names = Index(index_path(taught, "train")).classes
    load_teacher(taught, names, CPU)
    with pytest.raises(PipelineError, match=r"(?s)classes differ from the index's.*class 1 being"):
        load_teacher(taught, [names[0], "another", *names[2:]], CPU)


def test_weights_published_for_other_classes_or_input_are_not_used_as_they_are(taught):
    names = Index(index_path(taught, "train")).classes
    swapped = [names[1], names[0], names[2]]
    (teacher_folder(taught) / "weights.safetensors").rename("t.safetensors")
    model = "model: regnety_002, kwargs: {depth: 8, output_stride: 8}, weights: t.safetensors"
    section = loaded("teacher.weights=t.safetensors", f"teacher.ensemble=[{{{model}}}]").teacher
    for known in (names, ["0", "1", "2"]):
        assert load_pretrained(section, known, Path("checksums"))[1]
        load_members(section, known, Path("checksums"))
    for load in (load_pretrained, load_members):
        with pytest.raises(PipelineError, match="(?s)weights whose classes differ from the index's.*class 0 being.*class_map"):
            load(section, swapped, Path("checksums"))
    with pytest.raises(PipelineError, match="(?s)another normalization.*std"):
        load_pretrained(section.model_copy(update={"std": (0.5, 0.5, 0.5)}), names, Path("checksums"))
    mapped = section.model_copy(update={"class_map": {name: names.index(name) for name in names}})
    as_indexed, as_swapped = (load_pretrained(mapped, order, Path("checksums"))[0] for order in (names, swapped))
    bias = "model.head.fc.bias"
    assert torch.equal(as_indexed.state_dict()[bias][[1, 0, 2]], as_swapped.state_dict()[bias])


def test_reused_predictions_are_in_a_student_s_identity_and_their_absence_is_not():
    config = resolve({"recipe": {"mix_prob": 0.0}}, (), "test")
    student = config.student_named("hard")
    default, reused = (
        configured_student(config, student.model_copy(update={"reuse_view": view}), "index") for view in (None, 3)
    )
    assert "reuse_view" not in default["student"]
    assert reused == default | {"student": default["student"] | {"reuse_view": 3}}
