"""On a real GPU; without one all of this is left out. Nothing that the other tests hold on a CPU is repeated here."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import make_data_set
from torch.nn.functional import conv2d

from pipeline.batches.batch import Batch
from pipeline.batches.loader import step_loader
from pipeline.batches.plan import Plan, Unit, training_plan
from pipeline.batches.transfer import DeviceToHostCopy, on_device
from pipeline.cli.main import main
from pipeline.cli.options import find_device
from pipeline.common.signals import Interrupted
from pipeline.config.params import dump, load_config
from pipeline.config.paths import index_path, store_path, teacher_logits_folder
from pipeline.config.schema import Config
from pipeline.config.store_spec import store_spec
from pipeline.models.build import build_student
from pipeline.models.teacher import TeacherForward, load_teacher
from pipeline.shards.index import Index
from pipeline.store.labelling import UnitWorker, recompute
from pipeline.store.manifest import read_manifest
from pipeline.store.reader import Store
from pipeline.training.log import read_log
from pipeline.training.meters import Throughput
from pipeline.training.run import Run
from pipeline.training.trainer import Trainer, train
from stages import teacher, teacher_logits, train_student

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # CUDA's threads are not those of Python that a forked worker would miss
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # torch 2.11's own
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # the compiler's advice to switch TF32 on
]

CHANGES = {
    "teacher": {
        "model": "regnety_002", "kwargs": {"depth": 8, "output_stride": 8}, "epochs": 1, "batch_size": 8,
        "workers": 0, "ema_decay": None, "min_top1": 0.0, "crop": 1.0, "drop_path": 0.0,
    },
    "teacher_logits": {"views": 8, "kind": "dense", "batch_groups": 2, "workers": 2, "channels_last": True},
    "student": {
        "kwargs": {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}, "epochs": 4, "batch_size": 8,
        "workers": 2, "ema_decay": 0.9, "lr": 0.05, "warmup_epochs": 1, "log_steps": 1, "drop_path": 0.1,
        "eval_epochs": 4,
    },
    "students": ["hard", "soft"],
    "variants": {"hard": {}, "soft": {"distillation": "soft", "tau": 3.0, "soft_reduction": "batchmean"}},
    "finetune": {
        "ema_decay": None, "size": 24, "views": 4, "epochs": 1, "batch_size": 8, "workers": 0, "from": "hard",
        "min_lr": 1e-5,
    },
    "evaluate": {"workers": 1, "crop": 1.0, "crop_finetuned": 1.0, "throughput_seconds": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return find_device("auto")


@pytest.fixture(scope="module")
def made(gpu, tmp_path_factory) -> Path:
    """A folder with every stage done on the GPU by the commands, in bfloat16."""
    root = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        counts = {"cat": 8, "dog": 6, "eel": 6}, {"cat": 2, "dog": 1, "eel": 1}
        config, _ = make_data_set(root, *counts, work="work", **CHANGES)
        Path("params.yaml").write_text(dump(config))
        for command in (
            "teacher", "teacher --for finetune", "teacher-logits", "teacher-logits --for finetune", "train-student",
            "finetune", "evaluate",
        ):  # fmt: skip
            done = CliRunner().invoke(main, command.split(), catch_exceptions=False)
            assert done.exit_code == 0, done.output
    return root


@pytest.fixture
def own(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder."""
    root = tmp_path / "own"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root


def loaded(*overrides: str) -> Config:
    return load_config("params.yaml", overrides)


def stored(config: Config) -> Store:
    """The store of the students' views."""
    fingerprint = read_manifest(teacher_logits_folder(config, "train-student") / "manifest.json")["fingerprint"]
    return Store.open(store_path(config, fingerprint), Index(index_path(config, "train")), config.recipe)


def batches(config: Config, workers: int = 2, pin: bool = True) -> tuple[Plan, Iterator[Batch]]:
    index = Index(index_path(config, "train"))
    plan = training_plan(index, config.recipe, config.student, 8)
    return plan, iter(step_loader(plan, index, range(6), range(1), 1, workers, pin))


@contextlib.contextmanager
def nobody_waits() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy() -> None:
    """The device, for some tenths of a second."""
    torch.cuda._sleep(500_000_000)


# the device


def test_the_device_found_has_a_number_and_is_the_current_one(gpu):
    assert gpu == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("name", ["matmul", "convolution"])
def test_float32_is_float32(gpu, name):
    a, b = (torch.randn(64, 64, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    compute = {"matmul": lambda a, b: a.flatten(1) @ b.flatten(1).T, "convolution": conv2d}[name]
    exact = compute(a.double(), b.double())
    found = compute(a.to(gpu), b.to(gpu)).cpu().double()
    assert (found - exact).abs().max() / exact.abs().max() < 2e-5  # TF32: about 5e-4


# batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_pinned(own, workers):
    _, found = batches(loaded(), workers)
    pinned = [tensor.is_pinned() for batch in found for tensor in batch.tensors().values()]
    assert len(pinned) == 6 * 6 and all(pinned)


def test_batches_on_the_device_hold_what_was_rendered_though_nobody_waited(own, gpu):
    _, expected = batches(loaded(), 0, False)
    _, found = batches(loaded())
    moved, arrived = on_device(found, gpu), []
    for _ in range(6):
        keep_busy()  # the copies must not wait for it, and what computes must wait for the copies
        with nobody_waits():
            batch = next(moved)
            arrived.append([tensor.clone() for tensor in batch.tensors().values()])
        del batch
    for batch, tensors in zip(expected, arrived, strict=True):
        for tensor, other in zip(batch.tensors().values(), tensors, strict=True):
            assert other.device == gpu and torch.equal(tensor, other.cpu())


def test_fetched_values_are_those_of_when_they_were_sent(gpu):
    sent = [torch.full((1000,), 1.5, device=gpu), torch.full((3,), 7, dtype=torch.int16, device=gpu)]
    with nobody_waits():
        keep_busy()
        fetched = DeviceToHostCopy(*sent)
        for tensor in sent:
            tensor.add_(1)
    found = fetched.get()
    assert [x.dtype for x in found] == [x.dtype for x in sent]
    assert (found[0] == 1.5).all() and (found[1] == 7).all()
    assert all(x.device.type == "cpu" and x.is_pinned() for x in found)


def test_speed_tells_the_peak_of_memory(gpu):
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=gpu)
    del held
    assert Throughput().snapshot()["gpu_mib"] >= 64


# steps


def student_run(config: Config, name: str, gpu: torch.device, folder: Path) -> Run:
    settings, index = config.student_named(name), Index(index_path(config, "train"))
    answers, _ = train_student.create_teacher(config, settings, "train-student", index, gpu)
    return Run(
        name, folder, {}, settings, training_plan(index, config.recipe, settings, 8), index,
        Index(index_path(config, "val")), build_student(settings, config.recipe, 3, 16), 16, 1.0,
        teacher=answers, distillation=settings, device=gpu,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_a_step_waits_for_nothing(own, gpu, name):
    config = loaded()
    run = student_run(config, name, gpu, own / "run")
    trainer, (_, found) = Trainer(run), batches(config)
    moved = on_device(found, gpu)
    trainer.train_step(moved)  # the first makes the optimizer's state
    values = []
    for _ in range(3):
        trainer.step += 1
        with nobody_waits():
            values.append(DeviceToHostCopy(trainer.train_step(moved)))
    assert all(torch.isfinite(fetched.get()[0]).all() for fetched in values)


def test_asking_the_teacher_waits_for_nothing(own, gpu):
    config, committed = loaded(), []
    forward = TeacherForward(load_teacher(config, Index(index_path(config, "train")).classes, gpu), config.teacher_logits, 16)
    worker = UnitWorker(config.teacher_logits, stored(config), forward, gpu, lambda *unit: committed.append(unit))
    worker.compute([Unit(0, 0)])  # the first makes cuDNN choose
    forward = worker.forward

    def asked(batches: list[Batch]) -> tuple[list[Batch], DeviceToHostCopy]:
        with nobody_waits():
            return forward(batches)

    worker.forward = asked
    worker.compute([Unit(0, 1)])
    assert [unit for unit, *_ in committed] == [Unit(0, 0), Unit(0, 1)]


def test_a_compiled_student_trains(own, gpu):
    config = loaded("student.compile=true", "student.channels_last=true", "student.epochs=1", "student.eval_epochs=1")
    train_student.run(config, gpu, "hard")
    metrics = json.loads(Path("outputs/small/students/hard/metrics.json").read_text())
    assert 0 < metrics["loss"] < 10


# a whole experiment


def test_every_stage_ran_and_the_report_names_the_gpu(made):
    folder = made / "outputs/small/evaluation"
    assert torch.cuda.get_device_name() in (folder / "report.html").read_text()
    models = json.loads((folder / "metrics.json").read_text())
    assert {"teacher", "hard", "soft", "hard-finetuned"} <= set(models)


def step_losses(config: Config) -> list[float]:
    logs = [read_log(path) for path in Path(config.work).glob("state/*/log.jsonl")]
    steps = [[line["loss"] for line in lines if line["kind"] == "step"] for lines in logs]
    return max(steps, key=len)


@pytest.mark.parametrize(("name", "tolerance"), [("hard", 1e-5), ("soft", 1e-3)])
def test_offline_is_online_in_float32(own, gpu, name, tolerance):
    config = loaded(
        "teacher_logits.precision=float32", "teacher_logits.batch_groups=1", "student.precision=float32",
        "student.deterministic=true", "student.lr=1e-3",
    )  # fmt: skip
    shutil.rmtree(stored(config).path)
    teacher_logits.run(config, gpu)
    found = []
    for how in ("stored", "online"):
        shutil.rmtree("work/state")
        train_student.run(config, gpu, name, teacher=how)
        found.append(torch.tensor(step_losses(config)))
    assert len(found[0]) > 8
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_a_unit_computed_again_has_the_same_predictions(own, gpu):
    config = loaded()
    [(_, found)] = recompute(config, store_spec(config, "train-student"), stored(config), [Unit(0, 0)], gpu)
    assert (found.flips, found.checks, found.largest) == (0, 0, 0)


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_a_run_ended_by_sigterm_goes_on_to_the_same_bits(own, gpu, monkeypatch, how):
    config, step = loaded("student.deterministic=true"), Trainer.train_step

    def signalled(self: Trainer, given: Iterator[Batch]) -> torch.Tensor:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, given)

    whole = student_run(config, how, gpu, own / "whole")
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 7"):
        patch.setattr(Trainer, "train_step", signalled)
        train(student_run(config, how, gpu, own / "ended"))
    resumed = student_run(config, how, gpu, own / "ended")
    train(resumed)
    for (name, tensor), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_a_teacher_trains_twice_to_the_same_bits_where_that_is_asked_for(own, gpu):
    config, weights = loaded("teacher.deterministic=true"), []
    for _ in range(2):
        shutil.rmtree("work/state", ignore_errors=True)
        teacher.run(config, gpu)
        weights.append(json.loads(Path("outputs/small/teacher/metrics.json").read_text())["weights"])
    assert weights[0] == weights[1]
