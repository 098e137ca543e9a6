"""`pipeline export` and `pipeline predict`: trained models outside the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import config_options

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config
    from pipeline.models.description import ModelDescription

WEIGHTS = click.option(
    "--weights", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="A weights.safetensors that a training wrote, instead of the experiment's --student.",
)  # fmt: skip
STUDENT = click.option(
    "--student", "name", metavar="NAME",
    help="A student of the experiment, or NAME-finetuned, or `teacher`; by default the trained student with the highest"
    " top-1 on the validation set.",
)  # fmt: skip


@click.command()
@STUDENT
@WEIGHTS
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["timm", "onnx", "torch"]),
    help="timm: a folder for timm.create_model('local-dir:...'); onnx: model.onnx; torch: model.pt2 of torch.export."
    " Repeat it for several; all by default.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Receives the files; outputs/NAME/export/STUDENT by default.")  # fmt: skip
@config_options
def export(
    path: str, overrides: tuple[str, ...], name: str | None, weights: Path | None, formats: tuple[str, ...],
    output: Path | None,
) -> None:  # fmt: skip
    """Write a trained model in formats that other software loads, with its class names and input settings.

    Each file is loaded again and its logits are compared with the model's, on 100 validation images. The folder
    also receives a model card, README.md. Earlier exports in other formats are kept if they are of the same
    weights, and deleted otherwise.

    \b
    Example:
      pipeline export --student token --format timm --format onnx
    """
    from pipeline.config.params import load_config
    from pipeline.config.paths import outputs
    from pipeline.models.description import load_model
    from pipeline.models.export import FORMATS, export, other_exports, timm_obstacle
    from pipeline.report.model_card import write_model_card

    config = load_config(path, overrides)
    weights = weights or _weights(config, name)
    model, description, about = load_model(weights, config.custom_models)
    folder = output or outputs(config) / "export" / weights.parent.name
    pictures, source = _comparison_pictures(config, description)
    if not formats:
        obstacle = timm_obstacle(model, description)
        formats = tuple(name for name in FORMATS if name != "timm" or not obstacle)
        if obstacle:
            print(f"timm: left out: {obstacle}")
    exports = export(model, description, pictures, folder, formats)
    card = folder / "README.md"
    others = keep_own_exports(card, weights, other_exports(folder, formats))
    write_model_card(card, weights, model, description, about, [*others, *(written.path for written in exports)])
    for written in exports:
        print(
            f"{written.path}: same predicted class for {100 * written.agreement:.0f} % of {len(pictures)} {source};"
            f" logits differ by at most {written.difference:.1g}"
        )
    print(f"{card}: model card")


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@STUDENT
@WEIGHTS
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="Classes to print per image.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@config_options
def predict(
    path: str, overrides: tuple[str, ...], images: tuple[Path, ...], name: str | None, weights: Path | None, top: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the most probable classes of images, and of all images below folders.

    \b
    Example:
      pipeline predict photo.jpg holiday/ --student token
    """
    import json

    from pipeline.common.errors import PipelineError
    from pipeline.common.wording import count_of
    from pipeline.config.params import load_config
    from pipeline.models.description import load_model
    from pipeline.models.predict import image_files, predict_files

    weights = weights or _weights(load_config(path, overrides), name)
    model, description, _ = load_model(weights, lambda: load_config(path, overrides).custom_models())
    failed = 0
    for prediction in predict_files(model, description, image_files(list(images)), top):
        if isinstance(prediction, PipelineError):
            click.echo(str(prediction), err=True)
            failed += 1
            continue
        pairs = list(zip(prediction.classes, prediction.probabilities, strict=True))
        if as_json:
            print(json.dumps({"image": str(prediction.image), "classes": dict(pairs)}))
        else:
            print(f"{prediction.image}: " + ", ".join(f"{label} {share:.1%}" for label, share in pairs))
    if failed:
        raise PipelineError(f"{count_of(failed, 'image')} could not be read", do="see the messages above")


def keep_own_exports(card: Path, weights: Path, others: list[Path]) -> list[Path]:
    """The earlier exports that are of these weights; those that an earlier card attributes to others are deleted."""
    from pipeline.models.export import remove_export
    from pipeline.report.model_card import described_weights, weights_line

    described = described_weights(card)
    if described == weights_line(weights):
        return others
    for other in others if described else []:
        remove_export(other)
        print(f"{other}: deleted, as it was exported from other weights")
    return []


def _weights(config: Config, name: str | None) -> Path:
    """The weights of a model of the experiment.

    Raises:
        UsageError: the experiment has no such model, or it has not been trained yet.
    """
    from pipeline.common.errors import NotReady, UsageError
    from pipeline.config.paths import evaluated_models

    models = evaluated_models(config)
    name = name or _best_student(models)
    if name not in models:
        raise UsageError(f"--student {name}", expected=f"one of {', '.join(models)}", found="no such model in params.yaml",
                         do="name one of these, or list it in students")  # fmt: skip
    weights = models[name] / "weights.safetensors"
    if not weights.exists():
        raise NotReady(f"{weights}: not trained yet", do="run: dvc repro")
    return weights


def _best_student(models: dict[str, Path]) -> str:
    """The trained student with the highest top-1 on the validation set, the first of several equal ones; says which it is.

    Raises:
        NotReady: no student has been trained yet.
    """
    from pipeline.cli.scan import read_json
    from pipeline.cli.status_table import headline_top1
    from pipeline.common.errors import NotReady
    from pipeline.config.paths import TEACHER

    trained = {
        name: headline_top1(read_json(folder / "metrics.json"), 0.0) or 0.0
        for name, folder in models.items()
        if name != TEACHER and (folder / "weights.safetensors").exists()
    }
    if not trained:
        raise NotReady("no student is trained yet", do="run: dvc repro; or choose --student teacher, or --weights FILE")
    best = max(trained, key=lambda name: trained[name])
    others = "the only trained student" if len(trained) == 1 else f"the best of {len(trained)} trained students"
    click.echo(f"student {best}: {others}, top-1 {trained[best]:.2%} on the validation set", err=True)
    return best


def _comparison_pictures(config: Config, description: ModelDescription) -> tuple[torch.Tensor, str]:
    """100 validation views, or random pixels where the experiment has no validation set."""
    import torch

    from pipeline.batches.loader import evaluation_loader
    from pipeline.config.paths import index_path
    from pipeline.shards.index import Index

    index = index_path(config, "val")
    if not index.exists():
        noise = torch.rand(100, 3, description.size, description.size, generator=torch.Generator().manual_seed(0))
        return 255 * noise, "random images"
    val = Index(index)
    loader = evaluation_loader(val, range(min(100, len(val))), description.size, description.crop, 100, 0, False)
    return torch.cat([batch.float() for batch in loader]), "validation images"
