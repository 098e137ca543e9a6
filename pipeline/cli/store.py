"""The commands `pipeline store ...` and `pipeline prune`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.cli.group import Group
from pipeline.cli.options import DEVICE, DRY_RUN, WHICH_STORE, config_options, find_device
from pipeline.common.wording import size_of

STORE = click.option("--store", "named", metavar="PATH", help="Path or URL of a store to use instead of the configured one.")


@click.group(cls=Group)
def store() -> None:
    """Estimate, describe, verify, repair, export, publish and fetch stores.

    \b
    Example:
      pipeline store verify --teacher 3
    """


@store.command()
@click.option("--views-per-second", "rate", default=1000.0, show_default=True, type=click.FloatRange(1e-3),
              help="Speed of teacher-logits, all processes together; its progress bar shows it.")  # fmt: skip
@click.option("--images", type=click.IntRange(1), help="Number of images, if there is no index yet.")
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(1, 65535),
              help="Number of classes, with --images.")  # fmt: skip
@WHICH_STORE
@config_options
def estimate(
    path: str, overrides: tuple[str, ...], purpose: str, rate: float, images: int | None, classes: int
) -> None:
    """Estimate bytes, files and hours, and after how many students the store has paid for itself.

    \b
    Example:
      pipeline store estimate --images 1281167 --views-per-second 5000
    """
    from pipeline.config.params import load_config
    from pipeline.config.paths import index_path
    from pipeline.config.store_spec import store_spec
    from pipeline.shards.index import Index
    from pipeline.store import estimate as costs

    config = load_config(path, overrides)
    spec = store_spec(config, purpose)
    if images is None:
        index = Index(index_path(config, "train"))
        samples, classes = index.samples.tolist(), len(index.classes)
    else:
        samples = costs.equal_shards(images, config.data.shard_samples)
    click.echo(costs.describe_estimate(spec, costs.estimate(spec, samples, classes), classes, rate))
    click.echo(costs.describe_break_even(config, spec, classes))


@store.command()
@click.option("--views", "folder", metavar="FOLDER", type=click.Path(file_okay=False, path_type=Path),
              help="Also read all predictions and write agreement.csv and agreement.png to FOLDER.")  # fmt: skip
@WHICH_STORE
@STORE
@config_options
def info(path: str, overrides: tuple[str, ...], purpose: str, named: str | None, folder: Path | None) -> None:
    """Describe a store: index, recipe, teacher, library versions, and which units are missing.

    With --views, also how the teacher sees each view: how often its class is the label, and the one that it
    predicts most often for the image, and its mean confidence (for topk, dense8 and dense).

    \b
    Examples:
      pipeline store info --for finetune
      pipeline store info --views agreement
    """
    from pipeline.cli.find_store import find_store
    from pipeline.config.params import load_config
    from pipeline.config.store_spec import store_spec
    from pipeline.store.maintenance import describe_store

    config = load_config(path, overrides)
    spec = store_spec(config, purpose)
    found = find_store(config, spec, named)
    click.echo(describe_store(found, spec))
    if folder:
        from pipeline.report.agreement import describe_agreement, write_agreement
        from pipeline.store.agreement import measure_agreement

        agreement = measure_agreement(found, spec)
        write_agreement(folder, agreement)
        click.echo("\n".join([describe_agreement(agreement), f"{folder}: agreement.csv, agreement.png"]))


@store.command()
@click.option("--teacher", "recompute", default=0, type=click.IntRange(0), metavar="N",
              help="Compute N random units again and report the largest difference.")  # fmt: skip
@DEVICE
@WHICH_STORE
@STORE
@config_options
def verify(path: str, overrides: tuple[str, ...], purpose: str, named: str | None, recompute: int, device: str) -> None:
    """Read every shard, row and chunk and compare checksums; exit code 1 if anything is wrong.

    \b
    Example:
      pipeline store verify --teacher 3
    """
    from pipeline.cli.find_store import find_store
    from pipeline.config.params import load_config
    from pipeline.config.store_spec import store_spec
    from pipeline.store import maintenance

    config = load_config(path, overrides)
    spec = store_spec(config, purpose)
    published = None if named else spec.folder / "manifest.json"
    maintenance.verify(config, spec, find_store(config, spec, named), published, recompute, find_device(device))


@store.command()
@WHICH_STORE
@STORE
@config_options
def repair(path: str, overrides: tuple[str, ...], purpose: str, named: str | None) -> None:
    """Remove damaged units and list what is missing; `pipeline teacher-logits` then computes just that.

    \b
    Example:
      pipeline store repair && pipeline teacher-logits
    """
    from pipeline.cli.find_store import find_store
    from pipeline.config.params import load_config
    from pipeline.config.store_spec import store_spec
    from pipeline.store import maintenance

    config = load_config(path, overrides)
    spec = store_spec(config, purpose)
    maintenance.repair(find_store(config, spec, named), spec)


@store.command()
@click.option("--parquet", "file", required=True, metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
              help="The Parquet file to write; needs the extra `parquet`.")  # fmt: skip
@WHICH_STORE
@STORE
@config_options
def export(path: str, overrides: tuple[str, ...], purpose: str, named: str | None, file: Path) -> None:
    """Write a complete store as a table: a row per image and view with key, label, argmax and what its kind holds.

    \b
    Example:
      pipeline store export --parquet predictions.parquet
    """
    from pipeline.cli.find_store import find_configured_store
    from pipeline.config.params import load_config
    from pipeline.config.store_spec import store_spec
    from pipeline.store.parquet import export_parquet

    config = load_config(path, overrides)
    spec = store_spec(config, purpose)
    rows = export_parquet(find_configured_store(config, spec, named), spec, file)
    click.echo(f"{file}: {rows:,} rows, {size_of(file.stat().st_size)}")


@store.command()
@click.argument("target")
@DRY_RUN
@WHICH_STORE
@STORE
@config_options
def publish(path: str, overrides: tuple[str, ...], purpose: str, named: str | None, target: str, dry_run: bool) -> None:
    """Publish a complete store at TARGET, so that others with the same images need no teacher.

    TARGET is a folder, a URL that fsspec knows (s3://..., hf://datasets/...), or a file named .tar. It gets
    the predictions, their checksums, a list of the samples, and a card in Markdown. Publishing more views
    later adds files; a call that was killed resumes where it stopped.

    \b
    Examples:
      pipeline store publish s3://bucket/regnety-160-imagenet-224
      pipeline store publish store.tar --dry-run
    """
    from pipeline.cli.find_store import find_configured_store
    from pipeline.config.params import load_config
    from pipeline.config.store_spec import store_section, store_spec
    from pipeline.store.publishing import publish_store, read_teacher_metrics

    config = load_config(path, overrides)
    spec = store_spec(config, purpose)
    found = find_configured_store(config, spec, named)
    metrics = read_teacher_metrics(spec.teacher_folder, found.attributes["teacher"])
    if published := publish_store(found, spec, target, metrics, dry_run):
        option = " --for finetune" if purpose == "finetune" else ""
        click.echo(f"{target}: {published.describe()}")
        click.echo(f"fetch it: pipeline store fetch {target}{option}, or set {store_section(purpose)}.fetch: {target}")


@store.command()
@click.argument("source")
@WHICH_STORE
@config_options
def fetch(path: str, overrides: tuple[str, ...], purpose: str, source: str) -> None:
    """Fetch the store published at SOURCE for the prepared images, in place of running a teacher.

    It is refused, naming the first difference, if it was made from different images or with a different
    recipe. A call that was killed resumes where it stopped. With teacher_logits.fetch in params.yaml,
    `dvc repro` does the same.

    \b
    Example:
      pipeline store fetch s3://bucket/regnety-160-imagenet-224
    """
    import torch

    from pipeline.config.params import load_config
    from pipeline.config.store_spec import store_section
    from stages import teacher_logits

    section = store_section(purpose)
    config = load_config(path, (*overrides, f"{section}.fetch={json.dumps(source)}"))
    teacher_logits.run(config, torch.device("cpu"), purpose)
    if getattr(load_config(path, overrides), section).fetch != source:
        print(f"set {section}.fetch: {source} in {path}, so that `pipeline evaluate` and `dvc repro` need no teacher either")


@click.command()
@click.option("--yes", is_flag=True, help="Delete them instead of only listing them.")
@click.option("--work", default="work", show_default=True, help="The folder with stores, state folders and data sets.")
def prune(yes: bool, work: str) -> None:
    """Find stores, state folders and data sets below WORK that nothing refers to any longer.

    It keeps everything that a configuration can use (params.yaml, configs/, and outputs/*/params.yaml, which
    records the last command's settings, overrides included), everything that a file under outputs/ names, and
    everything that a process is using, here or possibly on another machine. What cannot be attributed is kept
    too. Caution: other projects that share WORK are not considered, so what only they need is listed, too.

    \b
    Example:
      pipeline prune
    """
    from pipeline.cli import prune as prune_command
    from pipeline.cli.configure import experiments

    used = sorted(Path("outputs").glob("*/params.yaml"))
    named = [Path("params.yaml"), *experiments().values(), *used]
    prune_command.run([file for file in named if file.exists()], work, yes)
