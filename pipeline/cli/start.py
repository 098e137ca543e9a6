"""The commands that come first: `pipeline init`, `configure`, `doctor` and `estimate`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import DEVICE, config_options, find_device
from pipeline.common.errors import UsageError

OUTPUT = click.option(
    "--output", default="params.yaml", show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
FORCE = click.option("--force", is_flag=True, help="Overwrite a params.yaml that holds changes.")


@click.command()
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--list", "as_list", is_flag=True, help="List the experiments with a line about each.")
@FORCE
@OUTPUT
def configure(name: str | None, overrides: tuple[str, ...], as_list: bool, force: bool, output: Path) -> None:
    """Write params.yaml: the defaults, with the changes of an experiment in configs/, then yours.

    \b
    Examples:
      pipeline configure --list
      pipeline configure cifar10
      pipeline configure imagenet-deit-tiny data.train=/data/train data.val=/data/val
    """
    from pipeline.cli import configure

    if as_list:
        return configure.list_experiments()
    if name is None:
        raise UsageError("pipeline configure", expected="the name of an experiment", do="see pipeline configure --list")
    configure.run(name, overrides, output, force)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--offline", is_flag=True, help="Use pretrained weights only if they are in the local cache.")
@FORCE
@click.option("--estimate/--no-estimate", "with_estimate", default=True, show_default=True,
              help="Measure this machine for a few seconds and print time and disk space.")  # fmt: skip
@DEVICE
@OUTPUT
def init(folder: Path, overrides: tuple[str, ...], device: str, output: Path, **options: bool) -> None:
    """Write a params.yaml that suits a folder of images, with the reason for each choice.

    FOLDER has one folder of images per class, or a folder for training and one for validation (or test),
    each with one folder of images per class. It may also be a table of paths and labels (CSV, TSV, JSON
    Lines, Parquet), or hold such tables or Parquet files named after the splits.

    Images and classes are counted, and sizes read from a sample; then image size, models, epochs, batch size
    and kind of store are chosen for them and for this machine. The teacher is fine-tuned from pretrained
    weights if they are available (cached or downloadable); otherwise it is trained from scratch.

    \b
    Examples:
      pipeline init photos
      pipeline init photos student.epochs=60 teacher_logits.views=60
    """
    from pipeline.cli import init

    init.run(folder, overrides, find_device(device), output, **options)


@click.command()
@config_options
def doctor(path: str, overrides: tuple[str, ...]) -> None:
    """Check what on this machine will make the experiment fail, or slow it down.

    It looks at versions, GPUs, decoders, cores, DVC, the speed and free space of the disk, shared memory and
    the limit of open files; it takes a few seconds and changes nothing. Exit code 1 if something will fail.

    \b
    Example:
      pipeline doctor
    """
    from pipeline.cli import doctor

    doctor.run(path, overrides)


@click.command()
@click.option("--images", type=click.IntRange(1, 2**31 - 1), help="Number of training images, if there is no index yet.")
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(1, 65535),
              help="Number of classes, with --images.")  # fmt: skip
@DEVICE
@config_options
def estimate(path: str, overrides: tuple[str, ...], device: str, images: int | None, classes: int) -> None:
    """Estimate time and disk space, and after how many students the store has paid for itself.

    Speeds of decoding, rendering, teacher and students are measured on this machine, in about a minute. The
    tables compare numbers of views and kinds of store, and students trained from the store with students
    trained with the teacher in the loop. Nothing is written. For a speed that you know, of another machine,
    see `pipeline store estimate`.

    \b
    Examples:
      pipeline estimate
      pipeline estimate --images 1281167
    """
    from pipeline.cli import estimate
    from pipeline.config.params import load_config

    estimate.run(load_config(path, overrides), find_device(device), images, classes)
