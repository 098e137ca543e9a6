"""`pipeline store ...` and `pipeline prune`: looking after stores."""

from pathlib import Path

import click

FOR = click.option(
    "--for", "purpose", type=click.Choice(["train-student", "finetune"]), default="train-student", show_default=True,
    help="Which store: at recipe.size for the students, or at finetune.size.",
)  # fmt: skip
STORE = click.option("--store", "named", metavar="PATH", help="A store named by hand.")


def config_options(body):
    """--config and --set, as every stage has them."""
    body = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of it."
    )(body)
    return click.option(
        "--config", "path", default="params.yaml", show_default=True, type=click.Path(dir_okay=False),
        help="The experiment's whole configuration.",
    )(body)  # fmt: skip


@click.group()
def store():
    """Look after a store: estimate, info, verify, repair.

    \b
    Example:
      pipeline store verify --teacher 3
    """


@store.command()
@click.option("--views-per-second", "rate", default=1000.0, show_default=True, type=click.FloatRange(1e-3),
              help="What teacher-logits reaches, all processes together; its progress bar tells.")  # fmt: skip
@click.option("--images", type=click.IntRange(1), help="Instead of the index's, where there is none yet.")
@FOR
@config_options
def estimate(path, overrides, purpose, rate, images):
    """Bytes, files, hours, and after how many students the dump pays.

    \b
    Example:
      pipeline store estimate --images 1281167 --views-per-second 5000
    """
    from pipeline.params import load
    from stages import store as stage

    stage.estimate(load(path, overrides), purpose, rate, images)


@store.command()
@FOR
@STORE
@config_options
def info(path, overrides, purpose, named):
    """What a store is of, with which versions it was written, and how far it is.

    \b
    Example:
      pipeline store info --for finetune
    """
    from pipeline.params import load
    from stages import store as stage

    stage.info(load(path, overrides), purpose, named)


@store.command()
@click.option("--teacher", "recompute", default=0, type=click.IntRange(0), metavar="N",
              help="Compute N random units again and report the largest difference.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]")
@FOR
@STORE
@config_options
def verify(path, overrides, purpose, named, recompute, device):
    """Read every shard, row and chunk and compare their checksums; exit code 1 if anything is wrong.

    \b
    Example:
      pipeline store verify --teacher 3
    """
    from pipeline.cli import find_device
    from pipeline.params import load
    from stages import store as stage

    stage.verify(load(path, overrides), purpose, named, recompute, find_device(device))


@store.command()
@FOR
@STORE
@config_options
def repair(path, overrides, purpose, named):
    """Drop damaged units and list what is missing; then `pipeline teacher-logits` computes just that.

    \b
    Example:
      pipeline store repair && pipeline teacher-logits
    """
    from pipeline.params import load
    from stages import store as stage

    stage.repair(load(path, overrides), purpose, named)


@click.command()
@click.option("--yes", is_flag=True, help="Delete them; without it they are only listed.")
@click.option("--work", default="work", show_default=True, help="The folder of stores and training state.")
def prune(yes, work):
    """Find stores and training state that neither params.yaml nor any of configs/ names.

    Named are those whose index (outputs/NAME/data), recipe and settings are a configuration's own;
    overrides with --set are not known here, so look at the list before you say --yes.

    \b
    Example:
      pipeline prune
    """
    from stages import store as stage

    files = [file for file in [Path("params.yaml"), *sorted(Path("configs").rglob("*.yaml"))] if file.exists()]
    stage.prune(files, work, yes)
