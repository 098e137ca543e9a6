"""`pipeline init`: from a folder of images to a params.yaml that suits them."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pipeline.cli import durations, photos
from pipeline.cli.annotated import annotate
from pipeline.cli.choices import Choice, Choices, choose, released_student, released_teacher
from pipeline.cli.configure import experiments
from pipeline.cli.machine import Level, check_cores, fastest_precision
from pipeline.cli.params_file import dropped_options, refuse_changed, what_next, write_params
from pipeline.cli.plan import FEW_PER_CLASS, Given, InitFacts, InitPlan, make_plan
from pipeline.common.cores import available_cores
from pipeline.config.params import override, resolve
from pipeline.config.schema import Config
from pipeline.models.hub import missing_weights

IMAGENET_CLASSES = 1_000
FEW = 100_000
"""Fewer images than this give a warning about training from scratch."""


def run(
    root: Path,
    overrides: tuple[str, ...],
    device: torch.device,
    output: Path,
    *,
    offline: bool = False,
    force: bool = False,
    with_estimate: bool = True,
) -> None:
    """Write `output` and print what was found, warnings and the estimate.

    Raises:
        UsageError: no class folders, an override that is invalid, or `output` holds changes.
        PipelineError: no images, or classes that differ.
    """
    found = photos.look(root)
    print(photos.describe(found))
    given = parse_overrides(overrides)
    facts = gather(found, device, offline, given)
    choices = _named(root, found) | choose(facts, given)
    config = configuration(choices, overrides)
    if not force:
        refuse_changed(output, config, experiments().values())
    expected = scratch_warnings(facts, make_plan(facts, given)) + missing_given_weights(config, given, offline)
    for line in photos.warnings(found) + expected:
        print(f"warning: {line}")
    if with_estimate:
        _print_estimate(config, found, device)
    if dropped := dropped_options(output, overrides):
        print(f"dropped, although the command that wrote {output} had them: {' '.join(dropped)}; repeat them to keep them")
    text = annotate(config, _unchanged(choices, overrides))
    write_params(output, ["pipeline", "init", str(root), *overrides], text)
    print(f"{output}: {config.name}, with a reason for each choice; {what_next(output)}")


def gather(found: photos.Photos, device: torch.device, offline: bool, given: Given = MappingProxyType({})) -> InitFacts:
    """The facts that choices depend on; says so where there are no pretrained weights, unless the user chose them."""
    gpu, classes = device.type == "cuda", len(found.train.classes)
    released = {"teacher": released_teacher(gpu), "student": released_student(gpu)}
    missing = {section: missing_weights(tag, offline) for section, tag in released.items() if f"{section}.weights" not in given}
    if classes == IMAGENET_CLASSES and "teacher" in missing:
        missing["teacher"] = "your data set has as many classes as ImageNet, so their classifier would be kept, although its classes are others"
    for section, reason in missing.items():
        if reason:
            print(f"pretrained weights {released[section]} are not used: {reason}")
    return InitFacts(
        images=len(found.train.names),
        classes=classes,
        short_side=found.short_side,
        majority=found.majority,
        megapixels=found.megapixels,
        gpu=gpu,
        precision=fastest_precision(device),
        pretrained=missing.get("teacher") == "",
        pretrained_student=missing.get("student") == "",
    )


def scratch_warnings(facts: InitFacts, plan: InitPlan) -> list[str]:
    """What to expect of models that are trained from scratch on these images."""
    scratch = [name for name in ("teacher", "student") if not plan.pretrained[name]]
    if not scratch or facts.images >= FEW:
        return []
    what = "everything is" if len(scratch) == 2 else "the students are" if scratch == ["student"] else "the teacher is"
    if facts.few:
        return [
            f"{what} trained from scratch on {facts.images / facts.classes:.0f} images per class, which is hopeless below"
            f" about {FEW_PER_CLASS}: use pretrained weights ({', '.join(f'{name}.weights' for name in scratch)}) or add"
            " images"
        ]
    if scratch == ["teacher"]:
        return []
    return [
        f"{what} trained from scratch. A DeiT learns little from so few images: expect it to stay well below its teacher,"
        " and more epochs to help"
    ]


def missing_given_weights(config: Config, given: Given, offline: bool) -> list[str]:
    """Pretrained weights that the user chose and that are not available now."""
    tags = {name: getattr(config, name).timm_tag for name in ("teacher", "student") if f"{name}.weights" in given}
    missing = {f"{name}.weights {tag}": missing_weights(tag, offline) for name, tag in tags.items() if tag}
    return [f"{what}: {reason}; training stops without them" for what, reason in missing.items() if reason]


def parse_overrides(overrides: tuple[str, ...]) -> Given:
    """The values of overrides by section.key; deeper keys are in the mapping that section.key then is.

    Raises:
        UsageError: one is not of the form section.key=value.
    """
    values: dict[str, Any] = {}
    for text in overrides:
        values = override(values, text)
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _named(root: Path, found: photos.Photos) -> Choices:
    data, val = found.data, f"{len(found.val.names):,} images"
    choices = {
        "name": Choice(photos.experiment_name(root), "the folder's name; results go to outputs/NAME/"),
        "data.train": Choice(data.train, f"{len(found.train.names):,} images"),
    }
    if data.source != "folder":
        choices["data.source"] = Choice(data.source, "recognized by the files' names and columns")
    if data.val_fraction:
        choices["data.val_fraction"] = Choice(data.val_fraction, f"{val} for validation, where no others were found")
    if data.val:
        choices["data.val"] = Choice(data.val, val)
    return choices


def configuration(choices: Choices, overrides: tuple[str, ...]) -> Config:
    """The defaults with the choices and then the overrides.

    Raises:
        UsageError: an override is not a valid key or value.
    """
    values: dict = {}
    for key, choice in choices.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = choice.value
    return resolve(values, overrides, "pipeline init")


def _unchanged(choices: Choices, overrides: tuple[str, ...]) -> Choices:
    """The choices, with another reason where an override has taken their place, or a part of it."""
    names = [text.partition("=")[0].split(".") for text in overrides]
    replaced = {".".join(name) for name in names} | set(parse_overrides(overrides))
    changed = {name[0] for name in names if len(name) > 1} | {".".join(name[:2]) for name in names if len(name) > 2}
    own = {key: Choice(None, "given on the command line") for key in replaced}
    own |= {key: Choice(None, "in part given on the command line") for key in changed}
    return {key: own.get(key, choice) for key, choice in choices.items()}


def _print_estimate(config: Config, found: photos.Photos, device: torch.device) -> None:
    images, classes = len(found.train.names), len(found.train.classes)
    rates = durations.measure(config, found.sample(24), classes, device)
    gpu = device.type == "cuda"
    seconds = durations.stage_seconds(config, rates, images, len(found.val.names), durations.Hardware(available_cores(), gpu))
    sizes = durations.bytes_written(config, rates, images, classes, found.bytes)
    print(durations.describe(seconds, sizes, device))
    if not gpu and (cores := check_cores()).level is Level.WARN:
        print(f"warning: {cores.text}")
    if sum(seconds.values()) > 3600 and not gpu:
        print("to shorten it: fewer epochs (teacher.epochs, student.epochs), a smaller recipe.size, a GPU")
