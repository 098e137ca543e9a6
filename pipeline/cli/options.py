"""Options that several commands share, and the steps that they imply: configuration, device, dry run."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import click

from pipeline.common.errors import UsageError

Body = Callable[..., Any]
"""The function behind a command."""


def _parse_part(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, slash, parts = value.partition("/")
    if not slash or not number.isdigit() or not parts.isdigit() or not int(number) < int(parts):
        raise click.BadParameter("expected I/N with I from 0 to N-1, for example 0/4")
    return int(number), int(parts)


def _purpose_option(text: str) -> Callable[[Body], Body]:
    purposes = click.Choice(["train-student", "finetune"])
    return click.option("--for", "purpose", type=purposes, default="train-student", show_default=True, help=text)


DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]",
    help="auto: a GPU if there is one; under torchrun, the GPU of the local rank.",
)  # fmt: skip
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only print what would be done, with sizes and counts.")
IF_NEEDED = click.option(
    "--if-needed", is_flag=True, help="Only write a placeholder if no configured student uses a teacher, as dvc repro does."
)
PART = click.option(
    "--part", callback=_parse_part, metavar="I/N", help="Compute only part I of N, 0 to N-1: every N-th unit, unless it is there already."
)
TEACHER = click.option(
    "--teacher", type=click.Choice(["stored", "online"]), default="stored", show_default=True,
    help="online: run the teacher in the training loop, on the same groups, as a baseline and to check the store.",
)  # fmt: skip
WHICH_STORE = _purpose_option("Which store: the one at recipe.size, or the one at finetune.size.")
WHICH_TEACHER = _purpose_option(
    "Which teacher: the one at recipe.size, or the one at finetune.size, adapted if teacher_finetune.epochs is not 0."
)


def config_options(body: Body) -> Body:
    """Add --config and --set, which the body receives as `path` and `overrides`."""
    body = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of the configuration."
    )(body)
    return click.option(
        "--config", "path", default="params.yaml", show_default=True, type=click.Path(dir_okay=False),
        help="The complete configuration of the experiment.",
    )(body)  # fmt: skip


def stage_options(with_device: bool = True, with_dry_run: bool = True) -> Callable[[Body], Body]:
    """Add the options of every stage; the body receives `config`, `device` and `dry_run`."""

    def decorate(body: Body) -> Body:
        @config_options
        @functools.wraps(body)
        def command(
            path: str, overrides: tuple[str, ...], dry_run: bool = False, device: str = "auto", **options: Any
        ) -> Any:
            from pipeline.cli.failures import recorded
            from pipeline.config.params import load_config, record_config

            config = load_config(path, overrides)
            stage = None if dry_run else stage_name(body.__name__, options)
            if not dry_run:
                record_config(config)
            if with_dry_run:
                options["dry_run"] = dry_run
            with recorded(config, stage) if stage else contextlib.nullcontext():
                if not with_device:
                    return body(config=config, **options)
                options["device"] = find_device(device)
                _prepare_workers(config, options["device"])
                if dry_run:
                    return _dry_run(body, config, options)
                with process_group():
                    return body(config=config, **options)

        if with_dry_run:
            command = DRY_RUN(command)
        return DEVICE(command) if with_device else command

    return decorate


SECTIONS = {
    "teacher": "teacher", "teacher-logits": "teacher_logits", "train-student": "student", "finetune": "finetune",
    "evaluate": "evaluate",
}  # fmt: skip
"""The configuration section that holds a command's `workers`."""


def _prepare_workers(config: Any, device: Any) -> None:
    """Leave cores, and enough open files, to the loader workers."""
    from pipeline.common.cores import allow_open_files, limit_threads, resolve_workers

    section = getattr(config, SECTIONS[str(click.get_current_context().info_name)])
    workers = resolve_workers(section.workers, device.type == "cuda")
    limit_threads(workers)
    allow_open_files(workers)


def _dry_run(body: Body, config: Any, options: dict[str, Any]) -> None:
    """Check what can be checked; results that an earlier stage has yet to make are reported, not errors."""
    from pipeline.cli.dry_run import check
    from pipeline.common.errors import NotReady

    check(config, str(click.get_current_context().info_name))
    try:
        body(config=config, **options)
    except NotReady as error:
        click.echo(f"not yet: {error}")


def stage_name(command: str, options: dict[str, Any]) -> str | None:
    """The stage's name in dvc.yaml; None if these options make it something that dvc.yaml does not run."""
    if any(options.get(key) is not None for key in ("distillation", "alpha", "tau", "store", "weights")):
        return None
    if options.get("teacher") == "online":
        return None
    name = command.replace("_", "-")
    if options.get("purpose") == "finetune":
        name += "-finetune"
    return f"{name}@{options['name']}" if options.get("name") else name


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leave torch's process group at the end of the block, or when a signal ends all ranks.

    After an error of this rank alone the others are still waiting in the group: leaving it would wait for them, while
    torchrun ends them as soon as this process has ended.
    """
    from pipeline.common.distributed import Rank
    from pipeline.common.signals import Interrupted

    try:
        yield
    except Interrupted:
        Rank.destroy_process_group()
        raise
    Rank.destroy_process_group()


def find_device(name: str):
    """The torch.device for `--device`; a GPU becomes the current one, with IEEE float32 arithmetic.

    Raises:
        UsageError: this machine has no such device.
    """
    import torch

    from pipeline.common.arithmetic import use_ieee_float32

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # set_device requires a number
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name}", expected="auto, cpu, cuda or cuda:N", found=str(error).splitlines()[0],
            do="choose a device that this machine has",
        ) from None  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)
    use_ieee_float32()
    return device
