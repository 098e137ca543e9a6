"""A run to its end: trained once, kept in its state folder, validated as configured now, and published."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.common.distributed import Rank, world_size
from pipeline.common.errors import PipelineError
from pipeline.common.files import atomic_write, remove_partial_files, write_json
from pipeline.common.lock import kernel_lock
from pipeline.common.versions import library_versions
from pipeline.config.paths import RUN_LOCK
from pipeline.config.validation import fingerprint
from pipeline.models.description import describe_model
from pipeline.models.provenance import START
from pipeline.models.weights import DESCRIPTION, TRAINED, load_weights, read_saved_weights, save_weights
from pipeline.training.identity import VALIDATION_INDEX
from pipeline.training.log import write_curve
from pipeline.training.monitoring import validate
from pipeline.training.origin import describe_training
from pipeline.training.run import Run
from pipeline.training.trainer import train

POLL_SECONDS = 0.5  # between two attempts to take another job's lock


def train_to_completion(run: Run) -> dict[str, Any]:
    """Train to the end unless that was done before; `run.model` then holds the final weights, on every rank.

    They stay in the state folder, so returning to an earlier configuration costs nothing. One job trains a run
    at a time; another job with the same run waits, and loads its weights.

    Returns:
        Metrics of the last epoch, validated on the current `run.val`: the weights do not depend on it, so it may
        differ from the validation set during training.

    Raises:
        PipelineError: as `train`; the final weights are damaged; a rank's run differs from rank 0's.
    """
    final, rank = run.folder / "final.safetensors", Rank.current(run.device)
    check_same_run(run, rank)
    # rank 0 decides: on a network file system the others may see the file later, and would train alone
    with contextlib.nullcontext() if rank.broadcast_object(final.exists()) else exclusive(run, rank):
        if rank.broadcast_object(final.exists()):
            metrics = _load(run, rank)
        else:
            metrics = _train(run, rank)
    if metrics["validation"] != run.validation:
        kept = {key: value for key, value in metrics.items() if "val_" not in key}
        return kept | {"validation": run.validation} | validate(run, run.model)
    return metrics


def check_same_run(run: Run, rank: Rank) -> None:
    """Refuse to train if ranks that see different files have different runs."""
    own = fingerprint(run.identity)
    first = rank.broadcast_object(own)
    if own != first:
        raise PipelineError(
            f"{run.name}: rank {rank.rank} of {rank.world_size}",
            expected=f"rank 0's run, {first}",
            found=f"a different run, {own}: settings, index, store or teacher differ on this rank",
            do="give all ranks the same files; if a network file system showed new ones late, start again",
        )


@contextlib.contextmanager
def exclusive(run: Run, rank: Rank) -> Iterator[None]:
    """Hold the run's lock, on rank 0, within the block; while another job holds it, poll.

    Each attempt is a broadcast of its own: a single one that waits would run into nccl's timeout.
    """
    with contextlib.ExitStack() as stack:
        waiting = False
        while not rank.broadcast_object(rank.rank != 0 or _locked(run, stack)):
            if rank.rank == 0 and not waiting:
                print(f"{run.name}: another process trains this run ({run.folder}); waiting until it ends", flush=True)
            waiting = True
            time.sleep(POLL_SECONDS)
        yield


def _locked(run: Run, stack: contextlib.ExitStack) -> bool:
    try:
        stack.enter_context(kernel_lock(run.folder / RUN_LOCK))
    except BlockingIOError:
        return False
    return True


def _train(run: Run, rank: Rank) -> dict[str, Any]:
    if rank.rank == 0:
        remove_partial_files(run.folder)
        write_json(run.folder / "run.json", run_record(run))
    metrics = train(run)
    if rank.rank == 0:
        about = {"run": fingerprint(run.identity), "ranks": world_size(), "metrics": metrics}
        with atomic_write(run.folder / "final.safetensors") as temporary:
            save_weights(temporary, run.model.model, about)
    return metrics


def run_record(run: Run) -> dict[str, Any]:
    """The contents of run.json: what `is_run_of` compares and, for people, the rest of the identity and the environment."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    environment = {"device": device, "ranks": world_size(), **library_versions()}
    about = {"name": run.name, "steps": run.steps, "environment": environment, VALIDATION_INDEX: run.val.fingerprint}
    return about | describe_training(run.identity)


def _load(run: Run, rank: Rank) -> dict[str, Any]:
    """Load the final weights, which rank 0 reads and broadcasts."""
    metrics: dict[str, Any] = {}
    if rank.rank == 0:
        final = run.folder / "final.safetensors"
        state, about = read_saved_weights(final)
        load_weights(run.model.model, state, str(final))
        metrics = about["metrics"]
    run.model.to(run.device)
    rank.broadcast(run.model.state_dict().values())
    return rank.broadcast_object(metrics)


def train_and_publish(run: Run, folder: Path, start: str | None) -> None:
    """Train to the end unless that was done before, and publish the results into `folder`, on rank 0.

    Args:
        start: see `student_start` and `finetune_start`.
    """
    metrics = train_to_completion(run)
    if Rank.current(run.device).rank:
        return
    description = describe_model(run.model, run.train.classes, run.size, run.crop, run.distilled).as_json()
    about = {"run": fingerprint(run.identity), TRAINED: describe_training(run.identity), DESCRIPTION: description}
    published = metrics | ({START: start} if start else {})
    publish(folder, lambda path: save_weights(path, run.model.model, about), description, published, run, metrics)
    figures = {key: value for key, value in metrics.items() if not isinstance(value, str)}
    print(f"{run.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def publish(
    folder: Path,
    save: Callable[[Path], None],
    description: Mapping[str, Any],
    metrics: Mapping[str, Any],
    run: Run | None = None,
    last_epoch: dict[str, Any] | None = None,
) -> None:
    """Write weights.safetensors, curve.csv, model.json and metrics.json; with `run`, both JSON files also hold its
    fingerprint.

    Args:
        save: writes the weights, with the description in their metadata.
        description: of the model, for people and scripts; the pipeline does not read it.
        run: the run of the weights; None: the pipeline did not train them.
        last_epoch: metrics of the run's last epoch.
    """
    with atomic_write(folder / "weights.safetensors") as temporary:
        save(temporary)
    write_curve(folder / "curve.csv", run.folder / "log.jsonl" if run else None, last_epoch)
    named = {"run": fingerprint(run.identity)} if run else {}
    for name, values in {"model.json": description, "metrics.json": metrics}.items():
        write_json(folder / name, {**values, **named})
