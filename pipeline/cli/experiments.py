"""The commands about several experiments: `pipeline study` and `pipeline compare`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.common.errors import UsageError


@click.command()
@click.argument("name", required=False)
@click.argument("action", type=click.Choice(["show", "run"]), default="show")
@click.option("--list", "as_list", is_flag=True, help="List the studies in configs/studies with a line about each.")
@click.option("--commands", is_flag=True, help="Print all commands, for a cluster's job array, and run none.")
@click.option("--cell", "cells", multiple=True, metavar="CELL", help="run: only this cell, for example NAME-1a2b3c/hard-seed0.")
@click.option("--dry-run", is_flag=True, help="run: only print the commands that are missing.")
@click.option("--from", "source", type=click.Path(exists=True, path_type=Path), metavar="CELLS.CSV",
              help="show: make table and figure from this file; or, without NAME, from NAME.csv of every study in a folder.")
@click.option("--to", "folder", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="show: write to this folder, as NAME.csv (not with --from), NAME-table.csv, NAME.md and NAME.png.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of the base.")
def study(name: str | None, action: str, as_list: bool, commands: bool, cells: tuple[str, ...], dry_run: bool,
          source: Path | None, folder: Path | None, overrides: tuple[str, ...]) -> None:  # fmt: skip
    """Run a matrix of experiments, or show its table.

    configs/studies/NAME.yaml names a base configuration, the axes that vary and the seeds. Each cell is a
    student of an ordinary configuration, which is written to outputs/NAME-.../params.yaml; `run` calls the
    ordinary commands for the cells that are not done. Shards, teachers, stores and students that exist already
    are used. It may be interrupted at any moment, and the same command resumes.

    Without an action, it prints mean, standard deviation and number of seeds of every metric so far, and
    writes cells.csv, table.csv, table.md and figure.png to outputs/studies/NAME. They can be made again from
    cells.csv alone, without data, params.yaml or outputs.

    \b
    Examples:
      pipeline study --list
      pipeline study digits-quick run
      pipeline study digits-quick
      pipeline study digits-quick --to results
      pipeline study --from results
      pipeline study cifar10-views --commands --set data.train=cifar10/train --set data.val=cifar10/test
    """
    from pipeline.cli import study, study_table

    if as_list:
        return study.list_studies()
    if name is None and source and source.is_dir():
        return study_table.show_all(source, folder)
    if name is None:
        raise UsageError("pipeline study", expected="the name of a study", do="see pipeline study --list")
    if action != "run" and (cells or dry_run):
        raise UsageError("--cell and --dry-run", expected="the action run", do=f"pipeline study {name} run")
    if (source or folder) and (action == "run" or commands):
        raise UsageError("--from and --to", expected="neither run nor --commands with them", do=f"pipeline study {name}")
    if source and source.is_dir():
        raise UsageError(f"--from {source}", expected="a file of cells with the name of a study", found="a folder",
                         do=f"pipeline study {name} --from {source / name}.csv")  # fmt: skip
    matrix = study.find(name, overrides)
    if commands:
        return study.print_commands(matrix)
    if action == "run":
        return study.run(matrix, cells, dry_run, study.run_subprocess)
    study_table.show(matrix, source, folder)


@click.command()
@click.argument("runs", nargs=-1, metavar="RUN RUN ...")
@click.option("--output", default="outputs/comparison.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Where the training curves are drawn.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def compare(runs: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Compare training runs: their metrics, the settings that differ, and their curves.

    A RUN is the folder of a student or a teacher, such as outputs/NAME/students/STUDENT, or NAME/STUDENT for
    short; a state folder, also of a training that still runs; or the short name that trackers show, such as
    student-token-1a2b3c4d. Only settings that a result depends on are compared, as the runs recorded them:
    also the fingerprints of images and store, and the weights that a run started from. Runs of equal
    settings whose results differ are pointed out, with what differs between the machines.

    \b
    Examples:
      pipeline compare digits/none digits/token
      pipeline compare outputs/digits/teacher outputs/digits-small/teacher --output teachers.png
    """
    from pipeline.cli import compare

    compare.run(runs, output, as_json)
