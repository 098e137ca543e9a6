"""The command line. Each command imports its stage inside its body, so `--help` needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import IF_NEEDED, WHICH_STORE, config_options, purpose_option, stage_options
from pipeline.cli.store_commands import prune, store
from pipeline.common.errors import PipelineError, UsageError, killed_worker_error

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config


class _Group(click.Group):
    """Tells the user's mistakes and the world's in one message each, without a traceback."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except PipelineError as error:
            told = error
        except RuntimeError as error:
            told = killed_worker_error(error)
            if told is None:
                raise
        click.echo(f"error: {told}", err=True)
        context.exit(told.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="deit-offline-distillation")
def main() -> None:
    """Offline distillation of DeiT: a teacher's answers are computed once and stored; every student
    after that trains against them without the teacher in the loop.

    \b
    The stages in their order (`dvc repro` runs them all):
      prepare        images to WebDataset shards and their index
      teacher        train the teacher, or read it from weights
      teacher-logits its answers about every augmented view, into the store
      train-student  a DeiT from shards and store
      finetune       on at a higher resolution, from a second store
      evaluate       what the paper reports, and report.html

    Beside them: configure, status (how far all is), views (look at a recipe), store and prune (look after
    stores).

    \b
    Example:
      pipeline configure digits && dvc repro
    """


@main.command()
@click.option(
    "--quick", is_flag=True, help="Files of the size and times that they had the last time are taken for unchanged."
)
@stage_options(with_device=False)
def prepare(config: Config, dry_run: bool, quick: bool) -> None:
    """Images to WebDataset shards (train and val) and their index.

    Samples are shuffled by data.seed and cut into shards of equal size; every image is decoded once,
    strictly, and what fails is named. Sources: digits (bundled), folder (class folders), shards
    (WebDataset tars that are there already). Run again, it reads everything and mends what is damaged
    or changed; `dvc repro` runs it with --quick, each time, so that changed images are noticed.

    \b
    Example:
      pipeline prepare --set data.source=folder --set data.train=photos/train --set data.val=photos/val
    """
    from stages import prepare

    prepare.run(config, dry_run, quick)


@main.command()
@stage_options(with_device=False, with_dry_run=False)
def needed(config: Config) -> None:
    """Write which teachers and stores the configured students need: dvc repro makes no other.

    \b
    Example:
      pipeline needed --set 'students=[none]'
    """
    from stages import needed

    needed.run(config)


@main.command()
@IF_NEEDED
@purpose_option("Which teacher: at recipe.size, or at finetune.size, where teacher_finetune.epochs adapt it.")
@stage_options()
def teacher(config: Config, device: torch.device, dry_run: bool, purpose: str, if_needed: bool) -> None:
    """Train the teacher on the shards, or read it from teacher.weights; evaluate it.

    It is refused below teacher.min_top1 on val: a wrong teacher must not label a million images.

    \b
    Examples:
      pipeline teacher --set teacher.weights=regnety_160.deit_in1k
      pipeline teacher --for finetune --set teacher_finetune.epochs=10
    """
    from stages import teacher

    if if_needed and not (config.needs_teacher(purpose) or (purpose == "train-student" and config.needs_teacher("finetune"))):
        return teacher.mark_unneeded(config, purpose)
    teacher.run(config, device, purpose, dry_run)


def _part(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, slash, parts = value.partition("/")
    if not slash or not number.isdigit() or not parts.isdigit() or not int(number) < int(parts):
        raise click.BadParameter("i/n with i from 0 to n-1, for example 0/4")
    return int(number), int(parts)


@main.command("teacher-logits")
@WHICH_STORE
@click.option("--part", callback=_part, metavar="I/N", help="Compute every N-th missing unit only, from the I-th on.")
@IF_NEEDED
@click.option("--break-lock", is_flag=True, help="Don't wait for a writer on another machine that is surely dead.")
@stage_options()
def teacher_logits(config: Config, device: torch.device, dry_run: bool, purpose: str, part: tuple[int, int] | None, break_lock: bool, if_needed: bool) -> None:
    """Run the teacher over the augmented views of every training image, into the zarr store.

    Stop it at any moment: the same command goes on where it was. Start it under torchrun, or several
    times with --part, and the processes share the work.

    \b
    Examples:
      pipeline teacher-logits --dry-run
      torchrun --nproc-per-node 8 -m pipeline teacher-logits
      pipeline teacher-logits --part 0/4
    """
    from stages import teacher_logits

    if if_needed and not config.needs_teacher(purpose):
        return teacher_logits.mark_unneeded(config, purpose)
    teacher_logits.run(config, device, purpose, part, dry_run, break_lock)


@main.command("train-student")
@click.option("--student", "name", metavar="NAME", help="One of `students`; all of them if not given.")
@click.option("--distillation", type=click.Choice(["none", "soft", "hard"]), help="Instead of the student's own.")
@click.option("--alpha", type=click.FloatRange(0, 1), help="Weight of the distillation loss.")
@click.option("--tau", type=click.FloatRange(0, min_open=True), help="Temperature of soft distillation.")
@click.option(
    "--teacher", type=click.Choice(["stored", "online"]), default="stored", show_default=True,
    help="online: the teacher in the loop over the same groups; the baseline, and the proof.",
)  # fmt: skip
@click.option("--store", metavar="PATH", help="A store named by hand; refused unless it is of this index and recipe.")
@stage_options()
def train_student(config: Config, device: torch.device, dry_run: bool, name: str | None, distillation: str | None, alpha: float | None, tau: float | None, teacher: str, store: str | None) -> None:
    """Train a DeiT student from the shards and the store; the teacher is never run.

    Killed anywhere, the same command goes on from the last checkpoint and ends with the same weights.

    \b
    Examples:
      pipeline train-student --student hard
      pipeline train-student --student hard --distillation soft --alpha 0.1 --tau 3
      torchrun --nproc-per-node 4 -m pipeline train-student --student hard
    """
    from pipeline.config.schema import Student
    from pipeline.config.validation import validate
    from stages import train_student

    changes = {"distillation": distillation, "alpha": alpha, "tau": tau}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes and name is None:
        raise UsageError(
            f"--{next(iter(changes))}", expected="--student NAME beside it", do="name the student that it changes"
        )
    for each in [name] if name else config.students:
        settings = config.student_named(each)
        if changes:
            settings = validate(Student, settings.model_dump() | changes, "options", "student")
        published = "-".join([each, *(f"{key}-{value}" for key, value in changes.items())])
        if teacher == "online":
            published += "-online"
        train_student.run(config, device, published, settings, teacher, store, dry_run)


@main.command()
@click.option("--student", "name", metavar="NAME", help="One of finetune.from; all of them if not given.")
@click.option(
    "--teacher", type=click.Choice(["stored", "online"]), default="stored", show_default=True,
    help="online: the teacher in the loop.",
)  # fmt: skip
@stage_options()
def finetune(config: Config, device: torch.device, dry_run: bool, name: str | None, teacher: str) -> None:
    """Go on with the students that finetune.from names, at finetune.size pixels.

    Needs the second store: pipeline teacher-logits --for finetune. Onto another data set: name weights
    trained elsewhere; heads of another number of classes begin anew, and without distillation no store is
    needed.

    \b
    Examples:
      pipeline finetune --student token
      pipeline finetune --set finetune.weights=outputs/imagenet-deit-base/students/token/weights.safetensors
    """
    from stages import finetune

    if not (name or config.finetune.students):
        click.echo("nothing to fine-tune: finetune.from names no student")
    for each in [name] if name else config.finetune.students:
        finetune.run(config, device, each, teacher, dry_run)


@main.command()
@click.option("--weights", metavar="FILE", help="Evaluate these alone, and write nothing: DeiT's released ones too.")
@click.option("--model", metavar="NAME", help="The timm model that --weights are of; else that of `student`.")
@click.option("--size", type=click.IntRange(8, 4096), help="Pixels for --weights; else recipe.size.")
@stage_options()
def evaluate(
    config: Config, device: torch.device, dry_run: bool, weights: str | None, model: str | None, size: int | None
) -> None:
    """Evaluate teacher, students and the fine-tuned ones; write metrics, pictures and report.html.

    evaluate.sizes evaluates each at other sizes too, its positions resized. That is not Table 10 of the paper,
    which fine-tunes a model at each size: for that, configure an experiment a size (finetune.size).

    \b
    Examples:
      pipeline evaluate --device cuda
      pipeline evaluate --weights deit_base_distilled_patch16_224-df68dfff.pth --model deit_base_distilled_patch16_224
    """
    from stages import evaluate

    if weights:
        return evaluate.run_weights(config, device, weights, model, size or config.recipe.size, dry_run)
    if model or size:
        raise UsageError("--model and --size", expected="--weights FILE beside them", do="name the weights")
    evaluate.run(config, device, dry_run)


@main.command()
@click.option("--key", help="A sample's key; one at random if not given.")
@click.option("--seed", default=0, show_default=True, help="Of the random choice.")
@click.option("--first", default=0, show_default=True, type=click.IntRange(0), help="The first view's number.")
@click.option("--count", default=7, show_default=True, type=click.IntRange(1, 99), help="How many views.")
@click.option("--members", default=8, show_default=True, type=click.IntRange(0), help="Of the mixed group, shown.")
@click.option("--ops", is_flag=True, help="The sample under every op of RandAugment instead, at four magnitudes.")
@click.option("--zoom", default=1.0, show_default=True, type=click.FloatRange(0.25, 16), help="Enlargement.")
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--output", default="views.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@config_options
def views(key: str | None, seed: int, first: int, count: int, members: int, ops: bool, zoom: float, split: str, output: Path, path: str, overrides: tuple[str, ...]) -> None:
    """Draw a contact sheet: a training image, its views with their parameters in words, its mixed group.

    Needs shards (pipeline prepare) and no teacher: look at a recipe before you pay for it.

    \b
    Examples:
      pipeline views --zoom 2
      pipeline views --ops --set recipe.size=224
      pipeline views --key n01440764_10026 --set recipe.auto_augment=original
    """
    from pipeline.cli import views
    from pipeline.config.params import load

    config = load(path, overrides)
    views.run(config, split, key, seed, range(first, first + count), members, ops, zoom, output)


@main.command()
@click.option("--watch", type=click.FloatRange(0.1), metavar="SECONDS", help="Draw it anew so often, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, one object a stage.")
@config_options
def status(path: str, overrides: tuple[str, ...], watch: float | None, as_json: bool) -> None:
    """How far every stage is, told by its files: state, count, speed, time left, loss and top-1.

    It asks no process and writes nothing. `running`: a store or a training whose lock is held on this
    machine; on another, a store with a lease that is renewed (one that was killed counts for five minutes
    more), a training whose files moved within ten minutes. `stopped`: the same command goes on from what
    is told. `failed`: its last command did, over what is told. `left`: for what is missing, at its recent speed.

    \b
    Examples:
      pipeline status
      pipeline status --watch 10
      pipeline status --json | jq '.[] | select(.state != "done")'
    """
    from pipeline.cli import status
    from pipeline.config.params import load

    status.run(load(path, overrides), as_json, watch)


@main.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--output", default="params.yaml", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
def configure(name: str, overrides: tuple[str, ...], output: Path) -> None:
    """Write params.yaml from an experiment of configs/: the defaults, what it changes, what you change.

    \b
    Examples:
      pipeline configure cifar10
      pipeline configure imagenet-deit-tiny data.train=/data/train data.val=/data/val
    """
    from pipeline.config.params import dump, load

    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("configs") / f"{name}.yaml"
    if not path.exists():
        known = sorted(str(file.relative_to("configs").with_suffix("")) for file in Path("configs").rglob("*.yaml"))
        raise UsageError(f"configuration {name!r}", expected=f"one of {', '.join(known)}", found=f"no {path}")
    config = load(path, overrides)
    command = " ".join(["pipeline configure", name, *overrides])
    header = f"# Written by: {command}\n# What the keys mean: pipeline/config/schema.py\n"
    output.write_text(header + dump(config))
    click.echo(f"{output}: {config.name}; now run: dvc repro")


main.add_command(store)
main.add_command(prune)
