"""Training: offline equals online, exact resume, the schedule, and what stops a run."""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_data_set
from torch import nn

from pipeline.batches.batch import Renderer, mixed
from pipeline.batches.plan import training_plan
from pipeline.common.errors import PipelineError, UsageError
from pipeline.common.lock import kernel_lock
from pipeline.common.signals import Interrupted
from pipeline.config.paths import (
    RUN_LOCK,
    finetune_folder,
    index_path,
    student_folder,
    teacher_folder,
    teacher_logits_folder,
)
from pipeline.config.schema import Config
from pipeline.models.adapt import fixres_modules
from pipeline.models.build import build_student, build_teacher
from pipeline.models.teacher import load_teacher
from pipeline.models.weights import read_weights
from pipeline.shards.index import Index
from pipeline.store.writer import StoreWriter
from pipeline.training import checkpoint
from pipeline.training import trainer as training
from pipeline.training.log import Log, read_log
from pipeline.training.run import Run
from pipeline.training.seeding import step_seed
from pipeline.training.teachers import create_teacher
from pipeline.training.trainer import Trainer, train
from stages import finetune, teacher, teacher_logits, train_student

PURPOSES = ("train-student", "finetune")
CPU = torch.device("cpu")
TINY_TEACHER = {
    "model": "regnety_002", "kwargs": {"depth": 8, "output_stride": 8}, "epochs": 1, "batch_size": 8,
    "precision": "float32", "workers": 0, "ema_decay": None, "min_top1": 0.0, "crop": 1.0, "drop_path": 0.0,
}  # fmt: skip
TINY_STUDENT = {
    "kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}, "epochs": 7, "batch_size": 8,
    "precision": "float32", "workers": 0, "ema_decay": 0.9, "lr": 0.05, "warmup_epochs": 1, "log_steps": 1,
    "drop_path": 0.1, "checkpoint_minutes": 0.0, "eval_epochs": 7,
}  # fmt: skip
CHANGES = {
    "teacher": TINY_TEACHER,
    "teacher_logits": {"views": 8, "kind": "dense", "precision": "float32", "batch_groups": 1, "workers": 0},
    "student": TINY_STUDENT,
    "students": ["hard", "soft", "none"],
    "variants": {
        "hard": {},
        "soft": {"distillation": "soft", "alpha": 0.5, "tau": 3.0, "soft_reduction": "batchmean"},
        "none": {"distillation": "none", "model": "deit_tiny_patch16_224"},
    },
    "finetune": {
        **{key: value for key, value in TINY_STUDENT.items() if key != "kwargs"},
        "size": 24, "teacher_size": 24, "views": 4, "epochs": 1, "from": "hard", "min_lr": 1e-5,
    },
    "evaluate": {"workers": 0, "crop": 1.0, "crop_finetuned": 1.0, "throughput_seconds": 0.0},
}


# of an undistilled student, on a CPU in float32; drop-path is drawn, so another torch may change them
RECORDED = [1.088534, 1.091031, 1.113389, 1.108593, 1.101251, 1.097926, 1.101695, 1.108798]


TUNED = "teacher_finetune.batch_size=8", "teacher_finetune.workers=0"


def loaded(*overrides: str) -> Config:
    from pipeline.config.params import load_config

    return load_config("params.yaml", overrides)


def losses(config: Config) -> list[float]:
    """Losses of every step of the only run that has a log of steps."""
    logs = [read_log(path) for path in Path(config.work).glob("state/*/log.jsonl")]
    longest = max(logs, key=lambda lines: len([x for x in lines if x["kind"] == "step"]))
    return [line["loss"] for line in longest if line["kind"] == "step"]


def trained_losses(config: Config, name: str, how: str) -> list[float]:
    shutil.rmtree(Path(config.work) / "state")
    train_student.run(config, CPU, name, teacher=how)
    return losses(config)


def newest_checkpoint() -> Path:
    """The one written last; the teacher's are there too."""
    return max(Path("work/state").glob("*/step-*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def test_deterministic_asks_torch_for_it_while_a_student_trains_and_no_longer(taught, monkeypatch):
    asked, step = [], Trainer.train_step

    def noting(self, batches):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", noting)
    train_student.run(loaded("student.deterministic=true"), CPU, "hard")
    assert asked and all(asked)
    assert not torch.are_deterministic_algorithms_enabled()


def test_hard_distillation_offline_equals_online_to_the_bit(taught):
    offline = trained_losses(taught, "hard", "stored")
    assert len(offline) >= 20
    assert offline == trained_losses(taught, "hard", "online")


def test_soft_distillation_offline_equals_online_up_to_float16(taught):
    offline = trained_losses(taught, "soft", "stored")
    assert offline == pytest.approx(trained_losses(taught, "soft", "online"), rel=2e-3)


def test_a_deit_with_two_heads_teaches_with_their_mean(taught):
    kwargs = "teacher.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}"
    config = loaded("teacher.model=deit_tiny_distilled_patch16_224", kwargs, "finetune.from=[]")
    teacher.run(config, CPU)
    teacher_logits.run(config, CPU)
    train = Index(index_path(config, "train"))
    stored, _ = create_teacher(config, config.student_named("soft"), "train-student", train, CPU)
    batch = Renderer(train, config.recipe).render(training_plan(train, config.recipe, config.student, 8).items(0))
    model, used = load_teacher(config, train.classes, CPU).model, batch.weights.flatten() > 0
    pictures = (mixed(batch) / 255 - torch.tensor(config.teacher.mean)[:, None, None]) / torch.tensor(config.teacher.std)[:, None, None]
    tokens = model.forward_features(pictures)
    logits = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    assert model.head.weight.shape == model.head_dist.weight.shape == (3, 24)
    torch.testing.assert_close(stored(batch, pictures).logits[used], logits[used].float(), rtol=2e-3, atol=2e-3)
    assert trained_losses(config, "hard", "stored") == trained_losses(config, "hard", "online")


def test_an_undistilled_student_sees_the_same_pictures(taught, monkeypatch):
    seen = []
    real = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: seen.append(batch.checks) or real(self, batch))
    train_student.run(taught, CPU, "none")
    none, seen[:] = list(seen), []
    train_student.run(taught, CPU, "hard")
    assert none == seen


def test_the_first_steps_have_the_recorded_losses(taught):
    train_student.run(taught, CPU, "none")
    assert losses(taught)[:8] == pytest.approx(RECORDED, rel=1e-3), (
        "bump TRAINING_VERSION, unless it is the views that changed, then record these"
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 5, 19])
def test_a_run_that_stops_anywhere_and_goes_on_ends_with_the_same_weights(taught, monkeypatch, at):
    undisturbed = taught.model_copy(update={"work": "undisturbed"})
    shutil.copytree("work/stores", "undisturbed/stores")
    train_student.run(undisturbed, CPU, "hard")
    expected = read_weights(student_folder(taught, "hard") / "weights.safetensors")
    real = Trainer.train_step

    def stopping(self, batches):
        if self.step == at:
            raise Stop
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "train_step", stopping)
        train_student.run(taught, CPU, "hard")
    train_student.run(taught, CPU, "hard")
    found = read_weights(student_folder(taught, "hard") / "weights.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("minutes", [0, 60])
def test_a_resumed_run_logs_every_step_and_epoch_once(taught, monkeypatch, minutes):
    """From a checkpoint, and from the start where there was none yet."""
    config = loaded(f"student.checkpoint_minutes={minutes}")
    real = Trainer.train_step

    def stopping(self, batches):
        if self.step == 7:
            raise Stop
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "train_step", stopping)
        train_student.run(config, CPU, "hard")
    train_student.run(config, CPU, "hard")
    log = read_log(newest_checkpoint().parent / "log.jsonl")
    assert [x["step"] for x in log if x["kind"] == "step"] == list(range(len(losses(config))))
    assert [x["epoch"] for x in log if x["kind"] == "epoch"] == list(range(1, config.student.epochs + 1))


def test_a_second_process_waits_for_the_run_and_takes_its_weights(taught, capfd):
    train_student.run(taught, CPU, "hard")
    state = newest_checkpoint().parent
    shutil.move(state / "final.safetensors", "final")

    def first_process():
        with kernel_lock(state / RUN_LOCK):
            said = ""
            held.set()
            while "waiting until it ends" not in said:
                said += capfd.readouterr().out
                time.sleep(0.01)
            shutil.move("final", state / "final.safetensors")

    held, steps = threading.Event(), len(read_log(state / "log.jsonl"))
    other = threading.Thread(target=first_process, daemon=True)
    other.start()
    held.wait()
    train_student.run(taught, CPU, "hard")
    other.join(60)
    assert len(read_log(state / "log.jsonl")) == steps


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(taught):
    train_student.run(taught, CPU, "hard")
    state = newest_checkpoint().parent
    (state / "final.safetensors").unlink()
    (state / ".step-000000009.ckpt.0123abcd.partial").write_bytes(b"half")
    train_student.run(taught, CPU, "hard")
    assert not list(state.glob("*.partial"))


def test_a_finished_run_is_not_trained_again(taught, monkeypatch):
    train_student.run(taught, CPU, "hard")
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained again"))
    train_student.run(taught, CPU, "hard")


def test_accumulation_changes_only_rounding(taught):
    settings = "student.drop_path=0", "student.epochs=8"
    whole = trained_losses(loaded(*settings), "hard", "stored")
    parts = trained_losses(loaded(*settings, "student.accumulation=2"), "hard", "stored")
    assert len(whole) >= 30
    assert parts == pytest.approx(whole, rel=1e-4)


def test_workers_change_nothing(taught):
    alone = trained_losses(loaded(), "hard", "stored")
    assert alone == trained_losses(loaded("student.workers=2"), "hard", "stored")


def test_a_non_finite_loss_stops_the_run_and_names_step_and_groups(taught, monkeypatch):
    real = Trainer.train_step

    def broken(self, batches):
        loss = real(self, batches)
        return loss * math.nan if self.step == 4 else loss

    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(PipelineError, match=r"(?s)step 4.*finite loss.*loss nan.* over 2 groups \(\d{6}\.tar group"):
        train_student.run(taught, CPU, "hard")


def test_the_last_good_checkpoint_survives_a_non_finite_loss(taught, monkeypatch):
    real = Trainer.train_step
    broken = lambda self, batches: real(self, batches) * (math.nan if self.step == 4 else 1)  # noqa: E731
    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(PipelineError):
        train_student.run(taught, CPU, "hard")
    newest = newest_checkpoint()
    assert newest.name == "step-000000004.ckpt"


def test_another_runs_checkpoint_is_refused(taught):
    train_student.run(taught, CPU, "hard")
    newest = newest_checkpoint()
    with pytest.raises(PipelineError, match="checkpoint of another run"):
        checkpoint.load(newest.parent, {"student": {"lr": 1.0}}, CPU, checkpoint.newest(newest.parent))


@pytest.mark.parametrize(("top1", "warned"), [(0.0, True), (1.0, False)])
def test_a_teacher_no_better_than_always_naming_the_largest_class_is_warned_of(taught, capsys, monkeypatch, top1, warned):
    monkeypatch.setattr(teacher, "_evaluate", lambda *_: {"top1": top1})
    val = Index(index_path(taught, "val"))
    assert teacher.accuracy_or_refusal(taught, build_teacher(taught.teacher, 3), val, 16, CPU)["top1"] == top1
    assert ("warning" in capsys.readouterr().out) is warned


def test_a_teacher_below_min_top1_is_refused_with_both_numbers(taught):
    shutil.rmtree(teacher_folder(taught))
    with pytest.raises(PipelineError, match=r"(?s)at least 1\.0000.*found: +0\.\d{4}"):
        teacher.run(loaded("teacher.min_top1=1.0"), CPU)
    assert not teacher_folder(taught).exists()


def test_a_store_of_another_teacher_than_the_published_one_is_refused(taught):
    metrics = teacher_folder(taught) / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"weights": "0" * 32}))
    with pytest.raises(UsageError, match=f"(?s)its teacher.*weights: .*, {'0' * 32}.*run: pipeline teacher-logits"):
        train_student.run(taught, CPU, "hard")
    train_student.run(taught, CPU, "none")
    metrics.unlink()
    train_student.run(taught, CPU, "hard")


def test_a_missing_unit_stops_a_student_before_it_trains(taught):
    chunk = next(Path("work/stores").glob("*.zarr/argmax/c/0/0"))
    chunk.unlink()
    with pytest.raises(PipelineError, match=r"(?s)incomplete.*1 unit missing.*run: pipeline teacher-logits"):
        train_student.run(taught, CPU, "hard")


def test_teacher_logits_computes_only_what_is_missing(taught, monkeypatch):
    before = {path: path.read_bytes() for path in Path("work/stores").rglob("c/*/*") if path.is_file()}
    next(Path("work/stores").glob("*.zarr/argmax/c/1/2")).unlink()
    computed = []
    real = StoreWriter.write_unit
    monkeypatch.setattr(
        StoreWriter, "write_unit", lambda self, unit, *rest: computed.append(unit) or real(self, unit, *rest)
    )
    teacher_logits.run(taught, CPU)
    assert [(unit.shard, unit.block) for unit in computed] == [(2, 1)]
    assert before == {path: path.read_bytes() for path in Path("work/stores").rglob("c/*/*") if path.is_file()}


def test_teacher_logits_mends_a_damaged_unit(taught):
    chunk = next(Path("work/stores").glob("*.zarr/argmax/c/1/2"))
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(PipelineError, match="run teacher-logits|teacher-logits"):
        train_student.run(taught, CPU, "hard")
    teacher_logits.run(taught, CPU)
    assert chunk.read_bytes() == whole


def test_more_views_add_blocks_to_the_same_store(taught):
    before = json.loads((teacher_logits_folder(taught, "train-student") / "manifest.json").read_text())
    teacher_logits.run(loaded("teacher_logits.views=12"), CPU)
    after = json.loads((teacher_logits_folder(taught, "train-student") / "manifest.json").read_text())
    assert after["fingerprint"] == before["fingerprint"]
    assert all(after["units"][name][:2] == units for name, units in before["units"].items())
    assert len(after["units"]["000000.tar"]) == 3


def test_parts_fill_the_same_store_as_one_process(taught):
    answers = teacher_logits_folder(taught, "train-student") / "manifest.json"
    before = answers.read_bytes()
    shutil.rmtree("work/stores")
    for part in range(3):
        teacher_logits.run(taught, CPU, part=(part, 3))
    assert answers.read_bytes() == before


def test_a_store_named_by_hand_of_another_recipe_is_refused(taught):
    store = next(Path("work/stores").glob("*.zarr"))
    with pytest.raises(UsageError, match="the store's recipe"):
        train_student.run(loaded("recipe.hflip=0.25"), CPU, "hard", store=str(store))


def test_a_changed_recipe_fills_another_store_and_leaves_the_first(taught):
    first = next(Path("work/stores").glob("*.zarr"))
    files = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    teacher.run(loaded("recipe.hflip=0.25"), CPU)
    teacher_logits.run(loaded("recipe.hflip=0.25"), CPU)
    assert len(list(Path("work/stores").glob("*.zarr"))) == 2
    assert files == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}


def test_a_student_with_reused_predictions_is_warned_of_and_is_another_run_on_the_same_pictures(taught, monkeypatch, capsys):
    seen, real = [], Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: seen.append(batch.checks) or real(self, batch))
    unmixed = "recipe.mix_prob=0", "student.epochs=2", "student.eval_epochs=2", "finetune.from=[]"
    teacher.run(loaded(*unmixed), CPU)
    teacher_logits.run(loaded(*unmixed), CPU)
    capsys.readouterr()
    seen.clear()
    train_student.run(loaded(*unmixed), CPU, "hard")
    own, seen[:] = list(seen), []
    assert "warning" not in capsys.readouterr().out
    before = set(Path("work/state").iterdir())
    reused = loaded(*unmixed, "variants.hard.reuse_view=5")
    train_student.run(reused, CPU, "hard")
    assert own == seen
    assert "warning: reuse_view 5" in capsys.readouterr().out
    assert len(set(Path("work/state").iterdir()) - before) == 1
    with pytest.raises(UsageError, match="reuse_view 5"):
        train_student.run(reused, CPU, "hard", teacher="online")
    with pytest.raises(UsageError, match="reuse_view 5"):
        create_teacher(reused, reused.student_named("hard"), "finetune", Index(index_path(reused, "train")), CPU)


def test_changed_pixels_stop_training_at_the_first_group(taught, monkeypatch):
    from pipeline.batches import batch

    real = batch.render

    def changed(*given, out):
        real(*given, out)
        out ^= 1

    monkeypatch.setattr(batch, "render", changed)
    with pytest.raises(PipelineError, match="(?s)the pictures and mixing that the teacher saw.*pixel"):
        train_student.run(taught, CPU, "hard")


def test_fine_tuning_goes_on_from_the_named_student_at_the_higher_resolution(taught):
    train_student.run(taught, CPU, "hard")
    teacher_logits.run(taught, CPU, "finetune")
    finetune.run(taught, CPU, "hard")
    tuned = read_weights(finetune_folder(taught, "hard") / "weights.safetensors")
    assert tuned["pos_embed"].shape == (1, 2 + 9, 24)


def test_fine_tuning_offline_equals_online_with_the_teacher_at_its_own_size(taught):
    config = loaded("finetune.teacher_size=16")
    train_student.run(config, CPU, "hard")
    teacher_logits.run(config, CPU, "finetune")
    finetune.run(config, CPU, "hard")
    offline = read_weights(finetune_folder(config, "hard") / "weights.safetensors")
    finetune.run(config, CPU, "hard", teacher="online")
    online = read_weights(finetune_folder(config, "hard") / "weights.safetensors")
    assert all(torch.equal(offline[key], online[key]) for key in offline)


def test_a_step_logs_its_loss_in_parts_its_gradient_and_its_speed(taught):
    train_student.run(taught, CPU, "soft")
    lines = [line for path in Path("work/state").glob("*/log.jsonl") for line in read_log(path)]
    line = next(line for line in lines if line["kind"] == "step" and "loss_label" in line)
    assert line["loss"] == pytest.approx(0.5 * line["loss_label"] + 0.5 * line["loss_distillation"], rel=1e-5)
    assert line["grad_norm"] > 0 and line["samples_per_s"] > 0 and 0 <= line["wait_s"] <= line["seconds"]
    assert line["views_per_decode"] == 2  # of repeated augmentation, in one slice


def test_what_an_epoch_publishes_has_nothing_of_the_machines_speed(taught):
    train_student.run(taught, CPU, "none")
    folder = student_folder(taught, "none")
    assert "speed" not in json.loads((folder / "metrics.json").read_text())
    assert "speed" not in (folder / "curve.csv").read_text().splitlines()[0].split(",")


def test_a_loss_that_explodes_stops_the_run_and_says_what_was_bearable(taught, monkeypatch):
    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, b: real(self, b) * (20 if self.step == 4 else 1))
    with pytest.raises(PipelineError, match=r"(?s)step 4.*a loss below 1\d.*found: +loss 2\d"):
        train_student.run(taught, CPU, "none")


def test_a_gradient_that_is_not_finite_is_not_saved(taught, monkeypatch):
    real = Trainer.gradient_norm
    monkeypatch.setattr(
        Trainer, "gradient_norm", lambda self: real(self) * (math.inf if self.step == 3 else 1)
    )
    with pytest.raises(PipelineError, match="(?s)step 3.*gradient norm inf"):
        train_student.run(taught, CPU, "none")
    assert newest_checkpoint().name == "step-000000003.ckpt"


def test_checkpoints_come_by_steps_too(taught, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, *_: saved.append(step))
    train_student.run(loaded("student.checkpoint_minutes=60", "student.checkpoint_steps=9"), CPU, "none")
    assert saved == [9, 18, 27, 28]


def test_fine_tuning_goes_on_onto_another_number_of_classes_from_named_weights(taught):
    train_student.run(taught, CPU, "none")
    start = student_folder(taught, "none") / "weights.safetensors"
    shutil.copy(start, "elsewhere.safetensors")
    tuning = CHANGES["finetune"] | {"from": "none", "weights": "elsewhere.safetensors"}
    config, _ = make_data_set(
        Path("other"), {"ant": 6, "bee": 6}, {"ant": 1, "bee": 1}, work="work",
        **CHANGES | {"students": [], "name": "transfer", "finetune": tuning},
    )  # fmt: skip
    finetune.run(config, CPU, "none")
    tuned = read_weights(finetune_folder(config, "none") / "weights.safetensors")
    assert tuned["head.weight"].shape == (2, 24)


def test_a_teacher_is_made_used_to_a_higher_resolution_in_its_last_layers_only(taught):
    config = loaded(*TUNED, "teacher_finetune.epochs=2")
    teacher.run(config, CPU, "finetune")
    before, after = (read_weights(teacher_folder(config, p) / "weights.safetensors") for p in PURPOSES)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model = build_teacher(config.teacher, 3).model
    parts = fixres_modules(model)
    adapted = tuple(f"{name}." for name, part in model.named_modules() if any(part is each for each in parts))
    assert len(adapted) == 2 and {name.rpartition(".")[0] + "." for name in changed} == set(adapted)
    assert any(name.endswith("running_mean") for name in changed)


def test_a_teacher_that_is_not_tuned_answers_for_fine_tuning_as_it_is(taught):
    before, after = (read_weights(teacher_folder(taught, p) / "weights.safetensors") for p in PURPOSES)
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = json.loads((teacher_folder(taught, "finetune") / "metrics.json").read_text())
    assert metrics["size"] == 24


def test_a_log_line_that_a_kill_cut_short_is_left_out(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write("step", 0, loss=1.0)
    with open(log.path, "a") as file:
        file.write('{"kind": "step", "st')
    assert [line["step"] for line in read_log(log.path)] == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(taught, monkeypatch, number):
    real = Trainer.train_step

    def signalled(self, batches):
        if self.step == 6:
            for _ in range(2):  # as from a scheduler, and from torchrun
                os.kill(os.getpid(), number)
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"by {number.name} at step 7") as caught:
        patch.setattr(Trainer, "train_step", signalled)
        train_student.run(taught, CPU, "hard")
    assert caught.value.exit_code == 128 + number
    assert newest_checkpoint().name == "step-000000007.ckpt"


WALKS = "train", "state_dict", "named_parameters", "named_buffers", "named_modules", "children"


def test_a_machine_that_cannot_compile_is_told_before_anything_is_computed(taught, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    shutil.rmtree("work/stores")
    with pytest.raises(UsageError, match=r"(?s)compile: true.*a C compiler.*set compile to false"):
        teacher_logits.run(loaded("teacher_logits.compile=true"), CPU)
    teacher_logits.run(taught, CPU)
    with pytest.raises(UsageError, match=r"(?s)compile: true.*none of .*gcc"):
        train_student.run(loaded("student.compile=true"), CPU, "hard")


def test_a_step_walks_no_model_and_seeds_no_device_but_its_own(taught, monkeypatch):
    """Each costs the host up to a millisecond, and a small share of a batch takes a GPU not many."""
    asked, real = [], Trainer.train_step

    def told(name: str, method: Callable) -> Callable:
        return lambda *args, **named: asked.append(name) or method(*args, **named)

    def watched(self, batches):
        with pytest.MonkeyPatch.context() as patch:
            for name in WALKS:
                patch.setattr(nn.Module, name, told(name, getattr(nn.Module, name)))
            patch.setattr(torch, "manual_seed", told("manual_seed", torch.manual_seed))
            return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", watched)
    train_student.run(taught, CPU, "hard")
    assert not asked


def test_every_step_finds_the_modules_in_their_modes_after_validation_too(taught, monkeypatch):
    """The student's all train; of a teacher that gets used to a resolution, what learns alone."""
    seen, real = [], Trainer.train_step

    def watched(self, batches):
        parts = {part for module in self.run.trainable for part in module.modules()} or set(self.run.model.modules())
        seen.append([part.training is (part in parts) for part in self.run.model.modules()])
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", watched)
    train_student.run(loaded("student.eval_epochs=1"), CPU, "hard")
    teacher.run(loaded(*TUNED, "teacher_finetune.epochs=2", "teacher_finetune.eval_epochs=1"), CPU, "finetune")
    assert len(seen) > 20 and all(map(all, seen))


def test_what_a_step_draws_are_the_numbers_of_torchs_own_seed(taught, monkeypatch):
    seeds, drawn, real = [], [], Trainer.loss

    def watched(self, batch):
        seeds.append(step_seed(self.run.settings.seed, self.step, 0))
        drawn.append(torch.get_rng_state())
        return real(self, batch)

    monkeypatch.setattr(Trainer, "loss", watched)
    train_student.run(taught, CPU, "none")
    for seed, state in zip(seeds, drawn, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), state)


def test_run_names_a_batch_that_ranks_do_not_divide(taught):
    settings = taught.student.model_copy(update={"accumulation": 4})
    index = Index(index_path(taught, "train"))
    run = Run(
        "odd", Path("odd"), {}, settings, training_plan(index, taught.recipe, taught.student, 8), index, index,
        build_student(taught.student, taught.recipe, 3, 16), 16, 1.0,
    )  # fmt: skip
    with pytest.raises(PipelineError, match="ranks x accumulation"):
        train(run)


def test_the_log_is_on_the_disk_before_a_checkpoint_is(taught, monkeypatch):
    order = []
    for kind, part in ((Log, "sync"), (checkpoint, "save")):
        real = getattr(kind, part)
        monkeypatch.setattr(kind, part, lambda *given, real=real, part=part: (order.append(part), real(*given))[1])
    train_student.run(taught, CPU, "none")
    assert len(order) > 2 and order == ["sync", "save"] * (len(order) // 2)


def test_a_teacher_that_is_poor_at_the_size_of_fine_tuning_is_refused_before_a_student_is_trained(taught, monkeypatch):
    accuracy = {16: 0.9, 24: 0.1}
    monkeypatch.setattr(teacher, "_evaluate", lambda config, model, val, size, device: {"top1": accuracy[size], "top5": 1})
    published = (teacher_folder(taught) / "metrics.json").read_bytes()
    with pytest.raises(PipelineError, match="at 24 px(.|\n)*set finetune.teacher_size to 16 or null"):
        teacher.run(loaded("teacher.min_top1=0.5"), CPU)
    assert (teacher_folder(taught) / "metrics.json").read_bytes() == published
    teacher.run(loaded("teacher.min_top1=0.5", "finetune.teacher_size=16"), CPU)
    teacher.run(loaded("teacher.min_top1=0.5", "finetune.from=[]"), CPU)


def test_an_evaluation_is_a_line_and_one_at_chance_after_a_third_of_the_run_a_warning(taught, capsys, monkeypatch):
    chance = 1 / 3
    for top1, warned in ((chance, 1), (0.9, 0)):
        monkeypatch.setattr(training, "validate", lambda run, model, prefix, top1=top1: {f"{prefix}val_top1_class": top1})
        shutil.rmtree("work/state")
        train_student.run(loaded("student.eval_epochs=1", "student.ema_decay=null"), CPU, "none")
        said = capsys.readouterr().err
        assert said.count(f"val_top1_class {top1:.4g}") == 7 and "student none: epoch 3 of 7: loss" in said
        assert said.count("is hardly better than always predicting the most frequent class (") == warned
