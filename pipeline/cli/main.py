"""The `pipeline` command. Each command imports what it runs inside its body, so that `--help` does not load torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.experiments import compare, study
from pipeline.cli.group import Group
from pipeline.cli.models import export, predict
from pipeline.cli.options import IF_NEEDED, PART, TEACHER, WHICH_STORE, WHICH_TEACHER, config_options, stage_options
from pipeline.cli.start import configure, doctor, estimate, init
from pipeline.cli.store import prune, store
from pipeline.common.errors import UsageError

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="deit-offline-distillation")
def main() -> None:
    """Offline distillation of DeiT: the teacher's predictions are computed once and stored; every student
    then trains from the store, without running the teacher.

    \b
    The stages, in order (`dvc repro` runs them all):
      prepare         pack images into WebDataset shards and index them
      teacher         train the teacher, or load it from weights
      teacher-logits  store its predictions for every augmented view
      train-student   train students from the shards and the stored predictions
      finetune        continue at a higher resolution, from a second store
      evaluate        report the accuracy of all models, in report.html

    The other commands: init writes settings for a folder of images, configure chooses an experiment, doctor
    checks the machine, estimate measures it and prints what an experiment costs, status shows how far every
    stage has got, views draws what a recipe produces, store inspects, repairs and publishes stores, predict
    classifies images with a trained model, export writes it for timm, ONNX Runtime and torch.export, study
    runs a matrix of experiments, compare shows runs side by side, prune frees disk space.

    \b
    Example:
      pipeline configure digits && dvc repro
    """


@main.command()
@click.option(
    "--quick", is_flag=True, help="Treat files whose size and modification time have not changed as unchanged."
)
@stage_options(with_device=False)
def prepare(config: Config, dry_run: bool, quick: bool) -> None:
    """Pack images into WebDataset shards (train and val) and index them.

    Samples are shuffled with data.seed and split into shards of equal size. Every image is fully decoded
    once; those that fail are listed with the reason. Sources (data.source): class folders, tables of paths,
    Parquet files, torchvision's data sets, existing WebDataset tars, and the bundled digits.

    Running it again reads everything and repairs what is damaged or has changed; `dvc repro` runs it with
    --quick every time, so that changed images are noticed.

    \b
    Example:
      pipeline prepare --set data.source=folder --set data.train=photos/train --set data.val=photos/val
    """
    from stages import prepare

    prepare.run(config, dry_run, quick)


@main.command()
@stage_options(with_device=False, with_dry_run=False)
def needed(config: Config) -> None:
    """Record which teachers and stores the configured students need; `dvc repro` makes only those.

    \b
    Example:
      pipeline needed --set 'students=[none]'
    """
    from stages import needed

    needed.run(config)


@main.command()
@IF_NEEDED
@WHICH_TEACHER
@stage_options()
def teacher(config: Config, device: torch.device, dry_run: bool, purpose: str, if_needed: bool) -> None:
    """Train the teacher on the shards, or load it from teacher.weights; then evaluate it.

    A teacher whose top-1 accuracy on val is below teacher.min_top1 is refused: a bad teacher must not label
    a million images.

    \b
    Examples:
      pipeline teacher --set teacher.weights=regnety_160.deit_in1k
      pipeline teacher --for finetune --set teacher_finetune.epochs=10
    """
    from stages import teacher

    if if_needed and not config.runs_teacher(purpose):
        return teacher.mark_unneeded(config, purpose)
    teacher.run(config, device, purpose, dry_run)


@main.command("teacher-logits")
@WHICH_STORE
@PART
@IF_NEEDED
@click.option("--break-lock", is_flag=True,
              help="Take over at once from a writer on another machine that you know to be dead.")  # fmt: skip
@stage_options()
def teacher_logits(config: Config, device: torch.device, dry_run: bool, purpose: str, part: tuple[int, int] | None,
                   break_lock: bool, if_needed: bool) -> None:  # fmt: skip
    """Run the teacher over the augmented views of every training image and store its predictions.

    It can be stopped at any time: the same command continues where it stopped. Under torchrun, or when
    started several times with --part, the processes share the work.

    \b
    Examples:
      pipeline teacher-logits --dry-run
      torchrun --nproc-per-node 8 -m pipeline teacher-logits
      pipeline teacher-logits --part 0/4
    """
    from stages import teacher_logits

    if if_needed and not config.needs_store(purpose):
        return teacher_logits.mark_unneeded(config, purpose)
    teacher_logits.run(config, device, purpose, part, dry_run, break_lock)


@main.command("train-student")
@click.option("--student", "name", metavar="NAME", help="One of `students`; default: all of them.")
@click.option("--distillation", type=click.Choice(["none", "soft", "hard"]), help="Overrides the student's own.")
@click.option("--alpha", type=click.FloatRange(0, 1), help="Weight of the distillation loss.")
@click.option("--tau", type=click.FloatRange(0, min_open=True), help="Temperature of soft distillation.")
@TEACHER
@click.option("--store", metavar="PATH",
              help="Use this store, of the same index and recipe; writes to students/NAME-other-store.")  # fmt: skip
@stage_options()
def train_student(config: Config, device: torch.device, dry_run: bool, name: str | None, distillation: str | None,
                  alpha: float | None, tau: float | None, teacher: str, store: str | None) -> None:  # fmt: skip
    """Train students from the shards and, unless --teacher online, from stored predictions.

    If the process is killed at any point, the same command resumes from the last checkpoint and ends with
    the same weights (bit for bit on a CPU).

    \b
    Examples:
      pipeline train-student --student hard
      pipeline train-student --student hard --distillation soft --alpha 0.1 --tau 3
      torchrun --nproc-per-node 4 -m pipeline train-student --student hard
    """
    from pipeline.config.schema import Student
    from pipeline.config.validation import validate
    from stages import train_student

    options = {"distillation": distillation, "alpha": alpha, "tau": tau}
    changes = {key: value for key, value in options.items() if value is not None}
    if changes and name is None:
        raise UsageError(
            f"--{next(iter(changes))}", expected="--student NAME with it", do="name the student that it applies to"
        )
    for each in [name] if name else config.students:
        settings = config.student_named(each)
        if changes:
            settings = validate(Student, settings.model_dump() | changes, "options", "student")
        published = "-".join([each, *(f"{key}-{value}" for key, value in changes.items())])
        if teacher == "online":
            published += "-online"
        if store:
            published += "-other-store"
        train_student.run(config, device, published, settings, teacher, store, dry_run)


@main.command()
@click.option("--student", "name", metavar="NAME", help="One of finetune.from; default: all of them.")
@TEACHER
@stage_options()
def finetune(config: Config, device: torch.device, dry_run: bool, name: str | None, teacher: str) -> None:
    """Fine-tune the students listed in finetune.from, at finetune.size pixels.

    Distilled students need the second store: pipeline teacher-logits --for finetune. To transfer to another
    data set, name weights trained elsewhere: if the number of classes differs, the heads are initialized
    from scratch; without distillation no store is needed.

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
@click.option("--weights", metavar="FILE", help="Only print the accuracy of these weights, for example DeiT's released ones.")
@click.option("--model", metavar="NAME", help="The timm model of --weights; default: the one of `student`.")
@click.option("--size", type=click.IntRange(8, 4096), help="Image size for --weights, in pixels; default: recipe.size.")
@stage_options()
def evaluate(config: Config, device: torch.device, dry_run: bool, weights: str | None, model: str | None,
             size: int | None) -> None:  # fmt: skip
    """Evaluate the teacher, the students and the fine-tuned students; write metrics, plots and report.html.

    With evaluate.sizes, every model is also evaluated at those sizes, with resized position embeddings. This
    is not Table 10 of the paper, which fine-tunes a model at each size: for that, configure one experiment
    per size (finetune.size).

    \b
    Examples:
      pipeline evaluate --device cuda
      pipeline evaluate --weights deit_base_distilled_patch16_224-df68dfff.pth --model deit_base_distilled_patch16_224
    """
    from stages import evaluate

    if weights:
        return evaluate.run_weights(config, device, weights, model, size or config.recipe.size, dry_run)
    if model or size:
        raise UsageError("--model and --size", expected="--weights FILE with them", do="name the weights")
    evaluate.run(config, device, dry_run)


@main.command()
@click.option("--key", help="A sample's key; default: a random sample.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random choice.")
@click.option("--first", default=0, show_default=True, type=click.IntRange(0), help="Number of the first view.")
@click.option("--count", default=7, show_default=True, type=click.IntRange(1, 99), help="Number of views.")
@click.option("--members", default=8, show_default=True, type=click.IntRange(0), help="Members of the mixed group to show.")
@click.option("--ops", is_flag=True, help="Show every RandAugment op at four magnitudes instead.")
@click.option("--zoom", default=1.0, show_default=True, type=click.FloatRange(0.25, 16), help="Scale of the sheet.")
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--output", default="views.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@config_options
def views(key: str | None, seed: int, first: int, count: int, members: int, ops: bool, zoom: float, split: str,
          output: Path, path: str, overrides: tuple[str, ...]) -> None:  # fmt: skip
    """Draw a contact sheet: a training image, its views with their parameters, and its mixed group.

    It needs the shards (pipeline prepare) but no teacher, so you can check a recipe before the teacher runs
    over it.

    \b
    Examples:
      pipeline views --zoom 2
      pipeline views --ops --set recipe.size=224
      pipeline views --key n01440764_10026 --set recipe.auto_augment=original
    """
    from pipeline.cli import views
    from pipeline.config.params import load_config

    config = load_config(path, overrides)
    views.run(config, split, key, seed, range(first, first + count), members, ops, zoom, output)


@main.command()
@click.option("--watch", type=click.FloatRange(0.1), metavar="SECONDS", help="Refresh at this interval until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with one object per stage.")
@config_options
def status(path: str, overrides: tuple[str, ...], watch: float | None, as_json: bool) -> None:
    """Show how far every stage has got: state, progress, speed, time left, loss and top-1 accuracy.

    It only reads files and checks locks. A stage is `running` while its lock is held on this machine; on
    another machine, while a store's lease is renewed (for up to five minutes after its writer was killed) or
    a run's files have changed in the last ten minutes. `stopped`: the same command resumes from the
    progress shown. `failed`: the last command ended with the error shown. `outdated`: done, but with another
    configuration. `left`: the time that the rest takes at the recent speed. `updated`: when a file of the
    stage last changed.

    \b
    Examples:
      pipeline status
      pipeline status --watch 10
      pipeline status --json | jq '.[] | select(.state != "done")'
    """
    from pipeline.cli import status
    from pipeline.config.params import load_config

    status.run(load_config(path, overrides), as_json, watch)


main.add_command(init)
main.add_command(configure)
main.add_command(doctor)
main.add_command(estimate)
main.add_command(store)
main.add_command(prune)
main.add_command(export)
main.add_command(predict)
main.add_command(study)
main.add_command(compare)
