"""Training on images without labels: only a student that learns from the teacher alone can."""

from pipeline.common.errors import UsageError
from pipeline.config.schema import Student


def check_unlabelled(unlabelled: int, name: str, student: Student | None, distilled: bool) -> None:
    """Refuse a run that would need the labels of images that have none.

    Args:
        unlabelled: the number of such training images.
        name: the run, for messages.
        student: None for a teacher.
        distilled: whether the model has a distillation head, so that its class head learns from labels alone.

    Raises:
        UsageError: the run needs labels.
    """
    if not unlabelled or (student is not None and not student.uses_labels and not distilled):
        return
    found = "a teacher, which learns from labels"
    do = "use a pretrained teacher with the index's classes, which is not trained, or remove these images"
    if student is not None:
        found = f"distillation {student.distillation}, alpha {student.alpha:g}"
        do = "set its distillation to soft or hard and alpha to 1, or remove these images"
        if not student.uses_labels:
            found = f"{student.model}, whose class head would learn nothing next to its distillation head"
            do = "use a model without a distillation token, such as deit_tiny_patch16_224"
    raise UsageError(
        f"{name}: {unlabelled:,} training images have no label (data.unlabelled)",
        expected="a student that learns from the teacher alone, through its class head",
        found=found,
        do=do,
    )
