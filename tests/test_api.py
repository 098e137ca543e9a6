"""The public Python interface: its batches are the pipeline's, and the examples' losses are those of train-student."""

import importlib.util
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from test_training import CPU, loaded, losses

import pipeline
from pipeline.batches.batch import mixed
from pipeline.config.schema import Config
from pipeline.models.build import build_student
from pipeline.training.optim import peak_lr
from pipeline.training.trainer import Trainer
from stages import teacher_logits, train_student

ROOT = Path(__file__).parent.parent
STEPS = 16  # four epochs: the first two are warm-up
SETTINGS = "student.epochs=4", "student.drop_path=0", "student.smoothing=0.1", "student.checkpoint_minutes=60"


def example(name: str):
    """An example, imported from its file."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(taught_template, tmp_path_factory):
    """A folder with a store, and what train-student did with it: losses and pictures per student."""
    root = Path(shutil.copytree(taught_template, tmp_path_factory.mktemp("api") / "taught"))
    seen: dict[str, list] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config, real, found = loaded(*SETTINGS), Trainer.loss, {}
        for name in ("hard", "soft"):
            noted = seen.setdefault(name, [])
            patch.setattr(
                Trainer, "loss", lambda self, batch, noted=noted: noted.append(mixed(batch)) or real(self, batch)
            )
            shutil.rmtree("work/state")
            train_student.run(config, CPU, name)
            found[name] = losses(config)
    return root, found, seen


@pytest.fixture
def config(trained, monkeypatch) -> Config:
    monkeypatch.chdir(trained[0])
    return loaded(*SETTINGS)


def initial_model(config: Config, name: str):
    """The timm model that train-student starts from."""
    return build_student(config.student_named(name), config.recipe, 3, config.recipe.size).model


def equal(a: pipeline.StudentBatch, b: pipeline.StudentBatch) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_importing_pipeline_imports_nothing_heavy_and_every_public_name_is_there():
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    assert set(pipeline.__all__) == set(pipeline._PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'open_batch'"):
        pipeline.open_batch  # noqa: B018
    source = (ROOT / "pipeline/__init__.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) == {"importlib", "typing"}
    assert (ROOT / "pipeline/py.typed").exists()


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_the_batches_are_those_of_train_student(config, trained, name):
    batches = pipeline.open_batches(config, name, workers=0)
    assert len(batches) == batches.epochs * batches.steps_per_epoch == len(trained[2][name])
    for batch, pictures in zip(batches, trained[2][name], strict=True):
        assert torch.equal(batch.pictures, pictures)
        assert (batch.logits is None) == (name == "hard")
        used = batch.weights > 0
        assert int(used.sum()) == batch.step_samples
        if batch.logits is not None:
            assert torch.equal(batch.argmax[used], batch.logits[used].argmax(1))


def test_any_step_can_be_asked_for_by_its_number(config):
    batches = pipeline.open_batches("params.yaml", "soft", workers=0)
    first = list(batches.steps(0, 6))
    assert [batch.step for batch in first] == list(range(6))
    assert all(map(equal, batches.steps(4, 6), first[4:]))
    with pytest.raises(pipeline.PipelineError, match="at least 0"):
        batches.steps(-1)


def test_ranks_and_accumulation_divide_a_step(config):
    whole = list(pipeline.open_batches(config, "soft", workers=0).steps(0, 3))
    ranks = [pipeline.open_batches(config, "soft", rank=rank, world_size=2, workers=0) for rank in range(2)]
    parts = pipeline.open_batches(config, "soft", accumulation=2, workers=0)
    shares = zip(*(rank.steps(0, 3) for rank in ranks), strict=True)
    turns = list(parts.steps(0, 3))
    for step, share, turn in zip(whole, shares, zip(turns[::2], turns[1::2], strict=True), strict=True):
        for pieces in (share, turn):
            assert {piece.step for piece in pieces} == {step.step}
            assert {piece.step_samples for piece in pieces} == {step.step_samples}
            assert torch.equal(torch.cat([piece.pictures for piece in pieces]), step.pictures)
            assert torch.equal(torch.cat([piece.logits for piece in pieces]), step.logits)
    assert {batches.fingerprint for batches in (*ranks, parts)} == {ranks[0].fingerprint}


def test_workers_and_a_loop_that_ends_early_change_nothing(config):
    expected = list(pipeline.open_batches(config, "soft", workers=0).steps(3, 6))
    loop = pipeline.open_batches(config, "soft", workers=2).steps(3)
    assert all(equal(next(loop), batch) for batch in expected)
    loop.close()


def test_padding_is_left_out_on_request(config):
    padded = next(b for b in pipeline.open_batches(config, "soft", workers=0) if b.step_samples < len(b.weights))
    batch = padded.without_padding()
    assert len(batch.pictures) == len(batch.logits) == len(batch.targets) == batch.step_samples
    assert torch.equal(batch.argmax, padded.argmax[padded.weights > 0]) and batch.step == padded.step


def test_uint8_pictures_are_the_rounded_ones(config):
    exact = next(pipeline.open_batches(config, workers=0).steps())
    batch = next(pipeline.open_batches(config, dtype=torch.uint8, workers=0).steps())
    assert batch.pictures.dtype == torch.uint8 and (batch.pictures - exact.pictures).abs().max() <= 0.5
    assert torch.equal(batch.argmax, exact.argmax)


def test_a_student_without_distillation_needs_no_store(config, monkeypatch):
    monkeypatch.setattr("pipeline.training.teachers.Store.open", lambda *_: pytest.fail("opened a store"))
    batch = next(pipeline.open_batches(config, "none", workers=0).steps())
    assert batch.argmax is None and batch.logits is None and batch.without_padding().argmax is None


def test_logits_can_be_asked_for_and_left_out(config):
    batch = next(pipeline.open_batches(config, "hard", logits=True, workers=0).steps())
    assert torch.equal(batch.logits.argmax(1)[batch.weights > 0], batch.argmax[batch.weights > 0])
    assert torch.equal(next(pipeline.open_batches(config, "none", logits=True, workers=0).steps()).logits, batch.logits)
    assert next(pipeline.open_batches(config, "soft", logits=False, workers=0).steps()).logits is None


def test_the_fingerprint_names_what_the_batches_depend_on(config):
    def fingerprint(*overrides: str, student: str = "hard", **arguments) -> str:
        return pipeline.open_batches(loaded(*SETTINGS, *overrides), student, **arguments).fingerprint

    same = fingerprint()
    assert same == fingerprint(workers=2) == fingerprint("student.lr=1.0")
    changed = [fingerprint(f"student.{x}") for x in ("seed=1", "batch_size=4", "smoothing=0.2", "open_shards=1")]
    changed += [fingerprint(student="soft"), fingerprint(student="none"), fingerprint(dtype=torch.uint8)]
    assert len({same, *changed}) == len(changed) + 1


def test_what_does_not_fit_is_refused_and_says_what_to_do(config):
    for arguments, text in {
        ("rank", 2): "rank 2, world_size 1", ("world_size", 3): "a multiple of world_size", ("rank", -1): "rank -1",
        ("dtype", torch.float16): "float32 or torch.uint8", ("purpose", "teacher"): "train-student or finetune",
        ("student", "nobody"): "student 'nobody'", ("store", "nowhere.zarr"): "no store",
    }.items():  # fmt: skip
        with pytest.raises(pipeline.PipelineError, match=text):
            pipeline.open_batches(config, **dict([arguments]))
    with pytest.raises(pipeline.PipelineError, match=r"(?s)logits for student hard.*logits=False"):
        pipeline.open_batches(loaded("teacher_logits.kind=argmax", "students=[hard]"), "hard", logits=True)
    with pytest.raises(pipeline.PipelineError, match="the store's recipe"):
        store = next(Path("work/stores").glob("*.zarr"))
        pipeline.open_batches(loaded("recipe.hflip=0.25"), "hard", store=str(store))


def test_views_that_the_teacher_did_not_see_are_refused(config, monkeypatch):
    from pipeline.batches import batch

    real = batch.render
    monkeypatch.setattr(batch, "render", lambda *given, out: [real(*given, out), out.__ixor__(1)])
    with pytest.raises(pipeline.PipelineError, match="the pictures and mixing that the teacher saw"):
        next(pipeline.open_batches(config, workers=0).steps())


def test_fine_tuning_has_the_second_store_s_batches(config):
    teacher_logits.run(config, CPU, "finetune")
    batches = pipeline.open_batches(config, "soft", purpose="finetune", workers=0)
    batch = next(batches.steps())
    assert batches.size == batch.pictures.shape[-1] == 24 and batch.logits is not None
    assert batches.epochs == config.finetune.epochs


# the examples


def close(found: list[float], expected: list[float]) -> bool:
    return len(found) == STEPS and found == pytest.approx(expected[:STEPS], rel=0, abs=1e-6)


def test_the_plain_loop_has_the_losses_of_train_student_also_when_resumed(config, trained, monkeypatch, tmp_path):
    plain, student = example("plain"), config.student_named("hard")
    monkeypatch.setattr(plain, "CHECKPOINT", tmp_path / "plain.ckpt")
    batches = pipeline.open_batches(config, "hard", workers=0)
    found = []
    for stop in (STEPS // 2, STEPS):
        found += plain.train(batches, initial_model(config, "hard"), stop, lr=peak_lr(student), alpha=student.alpha)
    assert close(found, trained[1]["hard"])
    with pytest.raises(SystemExit, match="other batches"):
        plain.train(pipeline.open_batches(config, "soft", workers=0), initial_model(config, "soft"), STEPS)


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_timm_s_task_has_the_losses_of_train_student(config, trained, name):
    pytest.importorskip("timm.task")
    timm_task, student = example("timm_task"), config.student_named(name)
    batches, model = pipeline.open_batches(config, name, workers=0), initial_model(config, name)
    model.no_weight_decay = lambda: {"pos_embed", "cls_token"}  # timm exempts dist_token too, which DeiT decays
    found = timm_task.train(
        batches, model, STEPS, student.distillation, student.alpha, student.tau,
        lr=peak_lr(student), weight_decay=student.weight_decay,
    )  # fmt: skip
    assert close(found, trained[1][name])


def test_the_store_answers_timm_s_task_once_per_batch(config):
    pytest.importorskip("timm.task")
    teacher = example("timm_task").TeacherFromStore(3, "soft")
    batch = next(pipeline.open_batches(config, "soft", workers=0).steps())
    teacher.set_batch(batch)
    assert torch.equal(teacher(batch.pictures), batch.logits)
    for without in (None, batch._replace(logits=None)):
        if without:
            teacher.set_batch(without)
        with pytest.raises(RuntimeError, match="set_batch"):
            teacher(batch.pictures)


def lightning_module(config: Config):
    """The example's module, with the student that train-student starts from."""
    student = config.student_named("soft")
    model = initial_model(config, "soft").train()
    model.set_distilled_training(True)
    settings = {"alpha": student.alpha, "tau": student.tau, "lr": peak_lr(student)}
    return example("lightning_module").DistilledStudent(model, **settings, config=config, student="soft", workers=0)


class LightningStandIn(torch.nn.Module):
    """What the example uses of a LightningModule in one process; the slow test uses Lightning itself."""

    device, global_rank, global_step = CPU, 0, 0
    trainer = types.SimpleNamespace(world_size=1, max_steps=STEPS)


def test_the_lightning_module_has_the_losses_of_train_student(config, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", types.SimpleNamespace(LightningModule=LightningStandIn))
    module, found = lightning_module(config), []
    module.setup("fit")
    optimizer = module.configure_optimizers()
    for number, batch in enumerate(module.train_dataloader()):
        module.on_train_batch_start(batch, number)
        loss = module.training_step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert close(found, trained[1]["soft"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own, of settings that a test does not need
def test_lightning_itself_trains_and_resumes_the_module(config, trained, monkeypatch, tmp_path):
    lightning = pytest.importorskip("lightning")
    found: list[float] = []

    def fit(stop: int, checkpoint: Path | None = None, config: Config = config):
        module = lightning_module(config)
        real = module.training_step
        monkeypatch.setattr(module, "training_step", lambda batch: [loss := real(batch), found.append(loss.item())][0])
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(
            max_steps=stop, max_epochs=-1, accelerator="cpu", default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, ckpt_path=checkpoint)
        return trainer

    fit(6).save_checkpoint(tmp_path / "six.ckpt")
    fit(STEPS, tmp_path / "six.ckpt")
    assert close(found, trained[1]["soft"])
    with pytest.raises(RuntimeError, match="other batches"):
        fit(STEPS, tmp_path / "six.ckpt", loaded(*SETTINGS, "student.seed=1"))
