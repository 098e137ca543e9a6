"""A step and a question to the teacher on a GPU that is only pretended: nothing mixes devices or waits."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretended import Diary, pretended_gpu
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.utils.data._utils.pin_memory import pin_memory

from pipeline.batches.batch import Batch
from pipeline.batches.loader import step_loader, unit_loader
from pipeline.batches.plan import Unit, training_plan
from pipeline.batches.transfer import DeviceToHostCopy, on_device
from pipeline.config.schema import Student, Teacher, TeacherLogits
from pipeline.models.build import NormalizedModel, build_student, build_teacher
from pipeline.models.teacher import TeacherForward
from pipeline.store import labelling
from pipeline.store.kinds import payload_width
from pipeline.training import teachers as teaching
from pipeline.training.run import NoTeacher, Run
from pipeline.training.scaling import SCALER_VALUES
from pipeline.training.teachers import OnlineTeacher, StoredTeacher
from pipeline.training.trainer import STEP_VALUES, Trainer

# of copying a model for its average
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def diary() -> Iterator[Diary]:
    with pretended_gpu() as diary:
        yield diary


# what the pretending is worth


def test_operands_of_two_devices_are_an_error(diary):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=GPU) + torch.ones(2)


@pytest.mark.parametrize("wait", [torch.Tensor.item, bool, float, torch.Tensor.tolist, torch.Tensor.nonzero])
def test_waiting_for_a_value_is_an_error(diary, wait):
    with pytest.raises((RuntimeError, DataDependentOutputException)):
        wait(torch.ones(1, device=GPU))


def test_copies_and_waiting_are_noted(diary):
    torch.ones(1).to(GPU)
    torch.ones(1).pin_memory().to(GPU, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert diary.of("copy") == [
        ("pageable", "device", "waiting", "computing"), ("pinned", "device", "passing by", "computing"),
    ]  # fmt: skip
    assert diary.of("host waits") == [("computing",)]


# the parts


def test_fetched_tensors_pass_by_into_pinned_memory_and_an_event_is_waited_for_asleep(diary):
    fetched = DeviceToHostCopy(torch.ones(2, device=GPU), torch.ones(3, dtype=torch.int16, device=GPU))
    passing = ("device", "pinned", "passing by", "computing")
    assert diary.notes == [("copy", *passing), ("copy", *passing), ("event", "computing")]
    found = fetched.get()
    assert [(len(x), x.dtype, x.device) for x in found] == [(2, torch.float32, CPU), (3, torch.int16, CPU)]
    assert diary.of("host waits") == [("event, asleep",)]


# a step

ASKED = TeacherLogits(precision="bfloat16", channels_last=True, batch_groups=1)
TEACHER = Teacher(model="regnety_002", kwargs={"depth": 8, "output_stride": 8})
STUDENT = Student(
    kwargs={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}, batch_size=8, ema_decay=0.9, workers=0
)
SOFT = {"distillation": "soft", "tau": 3.0}


def answering(kind: str, monkeypatch) -> StoredTeacher:
    """Answers of zeros as they come out of a store, without one."""

    def stored(store: SimpleNamespace, batch: Batch, kind: str, reuse_view: None) -> tuple[torch.Tensor, torch.Tensor | None]:
        count, width = batch.labels.numel(), payload_width(kind, store.classes, 2)
        types = {"dense": torch.float16, "dense8": torch.uint8, "topk": torch.uint16, "sampled": torch.uint16}
        payload = torch.zeros(count, width, dtype=types[kind]) if kind in types else None
        return torch.zeros(count, dtype=torch.int64), payload

    monkeypatch.setattr(teaching, "read_predictions", stored)
    return StoredTeacher(SimpleNamespace(classes=3), kind)


def teacher_on_device() -> NormalizedModel:
    with unset_fake_temporarily():
        teacher = build_teacher(TEACHER, 3)
    return teacher.to(GPU).eval()


def prepared(small_set, diary: Diary, settings: Student, teacher) -> tuple[Trainer, Iterator[Batch]]:
    """A trainer on the device, and batches from pinned memory; what was noted before its first step is forgotten."""
    config, index = small_set
    plan, parts = training_plan(index, config.recipe, settings, 8), settings.accumulation
    with unset_fake_temporarily():
        batches = list(step_loader(plan, index, range(3), range(parts), parts, 0, False))
        model = build_student(settings, config.recipe, 3, config.recipe.size)
    run = Run(
        "pretended", Path("run"), {}, settings, plan, index, index, model, config.recipe.size, 1.0, teacher=teacher,
        distillation=settings, device=GPU,
    )  # fmt: skip
    trainer = Trainer(run)
    diary.parameters = model.parameters
    diary.notes.clear()
    return trainer, on_device((pin_memory(batch) for batch in batches), GPU)


def one_step(trainer: Trainer, batches: Iterator[Batch]) -> DeviceToHostCopy:
    values = trainer.train_step(batches)
    count = len(STEP_VALUES) + len(SCALER_VALUES) * bool(trainer.scaler)
    assert values.device == GPU and values.shape == (count,)
    trainer.step += 1
    return DeviceToHostCopy(values)


def assert_nothing_waits(diary: Diary) -> None:
    assert not diary.of("host waits")
    assert {how for _, _, how, _ in diary.of("copy")} == {"passing by"}
    assert "pageable" not in {place for source, target, *_ in diary.of("copy") for place in (source, target)}


CASES = {
    "plain": ({"distillation": "none", "model": "deit_tiny_patch16_224"}, None, 6),
    "hard": ({}, "argmax", 7),
    "soft": (SOFT, "dense", 8),
    "soft_dense8": (SOFT, "dense8", 8),
    "soft_topk": (SOFT, "topk", 8),
    "soft_sampled": (SOFT, "sampled", 8),
    "online": (SOFT, "online", 6),
    "accumulated": ({"accumulation": 2, "clip_grad": 1.0}, "argmax", 14),
    "float16": ({"precision": "float16", "clip_grad": 1.0, "accumulation": 2}, "argmax", 14),
    "channels_last": ({"channels_last": True, "precision": "float32"}, "argmax", 7),
}


@pytest.mark.parametrize(("changes", "kind", "copies"), CASES.values(), ids=CASES)
def test_a_step_waits_for_nothing_and_mixes_no_devices(in_tmp, small_set, diary, monkeypatch, changes, kind, copies):
    if kind == "online":
        teacher = OnlineTeacher(TeacherForward(teacher_on_device(), ASKED, 16))
    else:
        teacher = answering(kind, monkeypatch) if kind else NoTeacher()
    trainer, batches = prepared(small_set, diary, STUDENT.model_copy(update=changes), teacher)
    for _ in range(2):
        diary.notes.clear()
        fetched = one_step(trainer, batches)
        assert_nothing_waits(diary)
        assert diary.of("copy").count(("device", "pinned", "passing by", "computing")) == 1
        assert len(diary.of("copy")) == copies + 1
    fetched.get()
    assert diary.of("host waits") == [("event, asleep",)]


def test_a_batch_is_copied_on_a_stream_of_its_own_and_computing_waits_for_it(in_tmp, small_set, diary):
    _, batches = prepared(small_set, diary, STUDENT.model_copy(update={"distillation": "none"}), NoTeacher())
    next(batches)
    copied = ("copy", "pinned", "device", "passing by", "copying")
    assert diary.notes == [copied] * 6 + [("stream waits", "computing", "copying")] + [("kept for", "computing")] * 6


# teacher-logits


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("argmax", "float32"), *((kind, "bfloat16") for kind in ("argmax", "topk", "dense8", "dense", "sampled"))],
)
def test_labelling_units_waits_for_predictions_alone(in_tmp, small_set, diary, monkeypatch, kind, precision):
    config, index = small_set
    settings = TeacherLogits(
        views=8, kind=kind, top_k=2, precision=precision, batch_groups=2, workers=0, channels_last=True
    )
    config = config.model_copy(update={"teacher_logits": settings})
    units = [Unit(0, 0), Unit(1, 1)]
    with unset_fake_temporarily():
        batches = list(unit_loader(units, index, config.recipe, 0, False))
    monkeypatch.setattr(labelling, "unit_loader", lambda *_: (pin_memory(batch) for batch in batches))
    store, asked, kept = SimpleNamespace(recipe=config.recipe, index=index), [], []
    worker = labelling.UnitWorker(settings, store, TeacherForward(teacher_on_device(), settings, 16), GPU, None)
    forward = worker.forward

    def noting(given: list[Batch]):
        diary.notes.clear()
        predictions = forward(given)
        assert_nothing_waits(diary)
        asked.append(len(given))
        return predictions

    def collect(given: list[Batch], predictions: DeviceToHostCopy) -> int:
        diary.notes.clear()
        found = predictions.get()
        assert diary.notes == [("host waits", "event, asleep")]
        assert [len(x) for x in found] == [4 * len(given)] * (2 if kind == "argmax" else 3)
        kept.append((len(given), len(asked)))
        return 0

    worker.forward, worker.collect = noting, collect
    worker.compute(units)
    assert sum(asked) == len(batches) and [count for count, _ in kept] == asked
    # the predictions of a forward pass are waited for once the next one is queued
    assert [after for _, after in kept] == [*range(2, len(asked) + 1), len(asked)]
