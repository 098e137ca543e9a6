"""`pipeline configure`: choosing an experiment."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.common.errors import UsageError

OUTPUT = click.option(
    "--output", default="params.yaml", show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)


@click.command()
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--list", "as_list", is_flag=True, help="List the experiments with a line about each.")
@OUTPUT
def configure(name: str | None, overrides: tuple[str, ...], as_list: bool, output: Path) -> None:
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
    configure.run(name, overrides, output)
