"""`pipeline store ...` and `pipeline prune`: looking after stores."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import DEVICE, WHICH_STORE, config_options, find_device

STORE = click.option("--store", "named", metavar="PATH", help="A store named by hand.")


@click.group()
def store() -> None:
    """Look after a store: estimate, info, verify, repair.

    \b
    Example:
      pipeline store verify --teacher 3
    """


@store.command()
@click.option("--views-per-second", "rate", default=1000.0, show_default=True, type=click.FloatRange(1e-3),
              help="What teacher-logits reaches, all processes together; its progress bar tells.")  # fmt: skip
@click.option("--images", type=click.IntRange(1), help="Instead of the index's, where there is none yet.")
@WHICH_STORE
@config_options
def estimate(path: str, overrides: tuple[str, ...], purpose: str, rate: float, images: int | None) -> None:
    """Bytes, files, hours, and after how many students the dump pays.

    \b
    Example:
      pipeline store estimate --images 1281167 --views-per-second 5000
    """
    from pipeline.cli import store as stage
    from pipeline.config.params import load

    stage.estimate(load(path, overrides), purpose, rate, images)


@store.command()
@WHICH_STORE
@STORE
@config_options
def info(path: str, overrides: tuple[str, ...], purpose: str, named: str | None) -> None:
    """What a store is of, with which versions it was written, and how far it is.

    \b
    Example:
      pipeline store info --for finetune
    """
    from pipeline.cli import store as stage
    from pipeline.config.params import load

    stage.info(load(path, overrides), purpose, named)


@store.command()
@click.option("--teacher", "recompute", default=0, type=click.IntRange(0), metavar="N",
              help="Compute N random units again and report the largest difference.")  # fmt: skip
@DEVICE
@WHICH_STORE
@STORE
@config_options
def verify(path: str, overrides: tuple[str, ...], purpose: str, named: str | None, recompute: int, device: str) -> None:
    """Read every shard, row and chunk and compare their checksums; exit code 1 if anything is wrong.

    \b
    Example:
      pipeline store verify --teacher 3
    """
    from pipeline.cli import store as stage
    from pipeline.config.params import load

    stage.verify(load(path, overrides), purpose, named, recompute, find_device(device))


@store.command()
@WHICH_STORE
@STORE
@config_options
def repair(path: str, overrides: tuple[str, ...], purpose: str, named: str | None) -> None:
    """Drop damaged units and list what is missing; then `pipeline teacher-logits` computes just that.

    \b
    Example:
      pipeline store repair && pipeline teacher-logits
    """
    from pipeline.cli import store as stage
    from pipeline.config.params import load

    stage.repair(load(path, overrides), purpose, named)


@click.command()
@click.option("--yes", is_flag=True, help="Delete them; without it they are only listed.")
@click.option("--work", default="work", show_default=True, help="The folder of stores, training state and data.")
def prune(yes: bool, work: str) -> None:
    """Find stores, training state and data that nothing needs any more.

    Needed is what a configuration names by its recipe and settings (params.yaml, configs/, and
    outputs/*/params.yaml, which holds what an experiment's last command used, overrides included), what
    any file under outputs/ refers to, and what a process works on, here or perhaps on another machine.
    What nothing tells whose it is stays too. Outputs of another folder that shares WORK are not known here.

    \b
    Example:
      pipeline prune
    """
    from pipeline.cli import prune as stage

    used = sorted(Path("outputs").glob("*/params.yaml"))
    named = [Path("params.yaml"), *sorted(Path("configs").rglob("*.yaml")), *used]
    stage.run([file for file in named if file.exists()], work, yes)
