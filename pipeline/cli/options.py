"""Options that commands share; the device that `--device` means."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import click

from pipeline.common.errors import UsageError

DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]",
    help="auto takes a GPU where there is one; under torchrun, the one of the local rank.",
)  # fmt: skip


DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, with sizes and counts, and do nothing."
)
IF_NEEDED = click.option(
    "--if-needed", is_flag=True, help="As dvc repro: leave a mark alone where no configured student listens to a teacher."
)


Body = Callable[..., Any]
"""Of a command."""


def config_options(body: Body) -> Body:
    """--config and --set: gives the body `path` and `overrides`."""
    body = click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of it."
    )(body)
    return click.option(
        "--config", "path", default="params.yaml", show_default=True, type=click.Path(dir_okay=False),
        help="The experiment's whole configuration.",
    )(body)  # fmt: skip


def stage_options(with_device: bool = True, with_dry_run: bool = True) -> Callable[[Body], Body]:
    """Options that every stage has: gives the body `config`, `device` and `dry_run`."""

    def decorate(body: Body) -> Body:
        @config_options
        @functools.wraps(body)
        def command(
            path: str, overrides: tuple[str, ...], dry_run: bool = False, device: str = "auto", **options: Any
        ) -> Any:
            from pipeline.cli.failures import noted
            from pipeline.config.params import load, record

            config = load(path, overrides)
            stage = None if dry_run else stage_name(body.__name__, options)
            if not dry_run:
                record(config)
            if with_dry_run:
                options["dry_run"] = dry_run
            with noted(config, stage) if stage else contextlib.nullcontext():
                if not with_device:
                    return body(config=config, **options)
                found = find_device(device)
                _leave_cores_to_workers(config, found)
                if dry_run:
                    return _foreseen(body, config, found, options)
                with left_together():
                    return body(config=config, device=found, **options)

        if with_dry_run:
            command = DRY_RUN(command)
        return DEVICE(command) if with_device else command

    return decorate


SECTIONS = {
    "teacher": "teacher", "teacher-logits": "teacher_logits", "train-student": "student", "finetune": "finetune",
    "evaluate": "evaluate",
}  # fmt: skip
"""Of each command, the section whose loader workers render for it."""


def _leave_cores_to_workers(config: Any, device: Any) -> None:
    from pipeline.common.cores import limit_threads, resolve_workers

    section = getattr(config, SECTIONS[str(click.get_current_context().info_name)])
    limit_threads(resolve_workers(section.workers, device.type == "cuda"))


def _foreseen(body: Callable, config: Any, device: Any, options: dict[str, Any]) -> None:
    """A dry run: what can be checked is, and what an earlier stage has yet to make is told and no error."""
    from pipeline.cli import dry_run as preview
    from pipeline.common.errors import NotReady

    preview.check(config, str(click.get_current_context().info_name))
    try:
        body(config=config, device=device, **options)
    except NotReady as error:
        click.echo(f"not yet: {error}")


def stage_name(command: str, options: dict[str, Any]) -> str | None:
    """What dvc.yaml calls it; None for what it has no stage of."""
    if any(options.get(key) is not None for key in ("distillation", "alpha", "tau", "store", "weights")):
        return None
    if options.get("teacher") == "online":
        return None
    name = command.replace("_", "-")
    if options.get("purpose") == "finetune":
        name += "-finetune"
    return f"{name}@{options['name']}" if options.get("name") else name


@contextlib.contextmanager
def left_together() -> Iterator[None]:
    """A job's ranks leave their process group at the end of the block, or when a signal ends all of them.

    After an error of this rank alone the others still wait in it: leaving would wait for them, while torchrun ends them
    as soon as this process has ended.
    """
    from pipeline.common.distributed import Rank
    from pipeline.common.signals import Interrupted

    try:
        yield
    except Interrupted:
        Rank.destroy_process_group()
        raise
    Rank.destroy_process_group()


def purpose_option(text: str):
    """--for: gives the body `purpose`."""
    purposes = click.Choice(["train-student", "finetune"])
    return click.option("--for", "purpose", type=purposes, default="train-student", show_default=True, help=text)


WHICH_STORE = purpose_option("Which store: at recipe.size for the students, or at finetune.size.")


def find_device(name: str):
    """The torch.device that `--device` names, made the current one where it is a GPU; float32 is IEEE's there.

    Raises:
        UsageError: this machine has no such device.
    """
    import torch

    from pipeline.common.arithmetic import use_ieee_float32

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # set_device takes none without a number
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name}", expected="auto, cpu, cuda or cuda:N", found=str(error).splitlines()[0],
            do="name a device that this machine has",
        ) from None  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)
    use_ieee_float32()
    return device
