"""The part of bench/gpu.py that trains twice and compares the weights' bits, without and with `deterministic`."""

import itertools

import torch
from experiment import Material, Stepping, make_material, timed
from lab import CLASSES, Lab, head, row

from pipeline.common.arithmetic import deterministic_kernels
from pipeline.config.schema import Student, Teacher
from pipeline.models.build import build_student, build_teacher
from pipeline.training.run import NoTeacher, Run
from pipeline.training.teachers import StoredTeacher
from pipeline.training.trainer import Trainer

STEPS = 12


def repeats_part(lab: Lab) -> None:
    """A student's steps with the store, and steps of a teacher that is trained, a group each, not compiled."""
    head(f"{STEPS} steps, twice", "deterministic", "weights", "of other bits", "largest difference", "ms a step")
    material = make_material(lab.root / "repeats", lab.index, lab.recipe, lab.groups, 3, lab.renderers, lab.pin)
    student = Student(
        model="deit_small_distilled_patch16_224", kwargs=lab.kwargs, batch_size=lab.views, compile=lab.compile
    )
    teacher = Teacher(model=lab.teacher_model, batch_size=lab.recipe.group_size)
    alone = make_material(lab.root / "alone", lab.index, lab.recipe, 1, 3, lab.renderers, lab.pin)
    for name, of, settings in (("student", material, student), ("teacher", alone, teacher)):
        for wanted in (False, True):
            (first, _), (second, seconds) = (trained(lab, of, settings, wanted) for _ in range(2))
            other = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
            largest = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
            count = sum(tensor.numel() for tensor in first)
            row(f"{name}: {settings.model}", "yes" if wanted else "no", f"{count:,}", f"{other:,}",
                f"{largest:.3g}", f"{1e3 * seconds:.4g}")  # fmt: skip


def trained(
    lab: Lab, material: Material, settings: Student | Teacher, wanted: bool
) -> tuple[list[torch.Tensor], float]:
    """All weights after STEPS steps from the same fresh ones, on the CPU; and seconds of a step, later ones."""
    size = material.plan.recipe.size
    with deterministic_kernels(wanted):
        if isinstance(settings, Student):
            model, answers = build_student(settings, lab.recipe, CLASSES, size), StoredTeacher(material.store, "argmax")
        else:
            model, answers = build_teacher(settings, CLASSES), NoTeacher()
        run = Run(
            "repeats", material.root / "run", {}, settings, material.plan, lab.index, lab.index, model, size, 1.0,
            teacher=answers, distillation=settings if isinstance(settings, Student) else None, device=lab.device,
        )  # fmt: skip
        step = Stepping(Trainer(run), itertools.cycle([batch.to(lab.device) for batch in material.steps]))
        timed(step, STEPS // 2, lab.device)
        seconds = timed(step, STEPS - STEPS // 2, lab.device)
    return [tensor.float().cpu() for tensor in model.state_dict().values()], seconds
