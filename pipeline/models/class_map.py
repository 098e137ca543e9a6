"""A teacher with more classes than the index: its classifier restricted to those of the index."""

from collections.abc import Sequence

import torch
from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]

from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.types import ClassMap
from pipeline.config.validation import short_repr

StateDict = dict[str, torch.Tensor]


def class_numbers(class_map: ClassMap, classes: Sequence[str]) -> list[int]:
    """The teacher's class number of each class of the index, in the index's order.

    Args:
        class_map: `teacher.class_map`: the numbers in this order, or by class name, or a label set of timm's
            ImageNetInfo, whose class names are WordNet's (n01440764).
        classes: class names of the index.

    Raises:
        UsageError: there is no such label set, or the classes are not those of the index.
    """
    if isinstance(class_map, list):
        if len(class_map) != len(classes):
            raise UsageError(
                "teacher.class_map",
                expected=f"{len(classes):,} numbers, one per class of the index",
                found=f"{len(class_map):,}",
                do="list the teacher's class for each class of the index, in its order, or map names to numbers",
            )
        return class_map
    numbers = label_set(class_map) if isinstance(class_map, str) else class_map
    unknown = [name for name in classes if name not in numbers]
    surplus = sorted(numbers.keys() - set(classes)) if isinstance(class_map, dict) else []
    if unknown or surplus:
        differences = [(word, names) for word, names in (("no", unknown), ("also", surplus)) if names]
        found = [f"{word} {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" for word, names in differences]
        raise UsageError(
            f"teacher.class_map {class_map}" if isinstance(class_map, str) else "teacher.class_map",
            expected=f"the {len(classes):,} class names of the index",
            found=" and ".join(found),
            do="correct the names: index.json lists the classes",
        )
    return [numbers[name] for name in classes]


def check_same_classes(
    what: str, published: Sequence[str], classes: Sequence[str], do: str, error: type[PipelineError] = PipelineError
) -> None:
    """Check that weights were published with the classes of the index, in its order.

    Where either has numbers instead of names, as existing shards may have, only the number of classes is compared.

    Raises:
        PipelineError: they were not; of the type `error`, with `what` and `do` in its message.
    """
    published, classes = list(published), list(classes)
    if not are_other_classes(published, classes):
        return
    number = next((i for i, pair in enumerate(zip(published, classes, strict=False)) if pair[0] != pair[1]), None)
    at = "" if number is None else f", class {number} being {{}}"
    raise error(
        f"{what} whose classes differ from the index's",
        expected=f"{len(classes):,} classes" + at.format(repr(classes[number or 0])),
        found=f"{len(published):,} classes" + at.format(repr(published[number or 0])),
        do=do,
    )


def are_other_classes(published: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether the weights' classes, or their order, differ from the index's; see `check_same_classes`."""
    published, classes = list(published), list(classes)
    unnamed = [str(number) for number in range(len(classes))]
    return len(published) != len(classes) or (published != classes and unnamed not in (published, classes))


def label_set(name: str) -> dict[str, int]:
    """Class numbers by class name of a label set that timm knows.

    Raises:
        UsageError: timm does not know it.
    """
    try:
        labels = ImageNetInfo(name).label_names()
    except AssertionError as error:
        raise UsageError(
            f"teacher.class_map {name!r}",
            expected="a label set of timm's ImageNetInfo such as imagenet-1k; a list of numbers; or names with numbers",
            found="timm knows no such label set",
            do="correct the name",
        ) from error
    return {label: number for number, label in enumerate(labels)}


def check_range(numbers: Sequence[int], teacher_classes: int) -> None:
    """Check that the teacher has classes with these numbers.

    Raises:
        UsageError: it has fewer.
    """
    if max(numbers) >= teacher_classes:
        raise UsageError(
            "teacher.class_map",
            expected=f"numbers below {teacher_classes:,}, the number of the teacher's classes",
            found=f"{max(numbers):,}",
            do="correct the numbers, which start at 0, or teacher.weights",
        )


def select_classes(state: StateDict, names: Sequence[str], numbers: Sequence[int], source: str) -> StateDict:
    """A state dict whose classifier has only the classes of these numbers, in this order.

    Selecting rows of the classifier's weight and bias selects its logits, so argmax and softmax are over these classes.

    Args:
        names: the parameters of the classifier's last layer, classes in dimension 0.

    Raises:
        UsageError: the weights have no classifier, or fewer classes.
    """
    missing = [name for name in names if name not in state]
    if missing or not names:
        raise UsageError(
            f"{short_repr(source)} with teacher.class_map",
            expected=f"weights with a classifier{': ' * bool(missing) + ', '.join(missing)}",
            found="none",
            do="set teacher.class_map to null: a new classifier is trained then",
        )
    check_range(numbers, min(len(state[name]) for name in names))
    return state | {name: state[name][list(numbers)] for name in names}
