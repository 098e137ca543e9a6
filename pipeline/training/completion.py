"""A run to its end: trained once, kept with its state, and validated on what the configuration names now."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.common.distributed import Rank, world_size
from pipeline.common.errors import PipelineError
from pipeline.common.files import atomic_write, remove_partial_files
from pipeline.common.lock import kernel_lock
from pipeline.config.paths import RUN_LOCK
from pipeline.config.validation import fingerprint
from pipeline.models.weights import load_weights, read_saved_weights, save_weights
from pipeline.training.identity import run_summary
from pipeline.training.log import write_curve
from pipeline.training.run import Run
from pipeline.training.trainer import train, validate

LOOK = 0.5  # seconds between two looks at another job's lock


def complete(run: Run) -> dict[str, Any]:
    """Train to the end unless that was done before; `run.model` holds the final weights then, on every rank.

    They stay with the run's state, so coming back to an earlier configuration costs nothing. One job at a
    time: another that is given the same run waits, and takes its weights.

    Returns:
        What the last epoch came to, as the log has it, validated on `run.val` as it is now: the weights do not
        depend on that, so it may be another than they were trained beside.

    Raises:
        PipelineError: as `train`; the final weights are damaged; a rank sees another run than rank 0.
    """
    final, rank = run.folder / "final.safetensors", Rank.init_process_group(run.device)
    refuse_another(run, rank)
    # rank 0 tells: on a network file system the others may see it later, and would train alone
    with contextlib.nullcontext() if rank.broadcast_object(final.exists()) else alone(run, rank):
        if rank.broadcast_object(final.exists()):
            metrics = _load(run, rank)
        else:
            metrics = _train(run, rank)
    if metrics["validation"] != run.validation:
        kept = {key: value for key, value in metrics.items() if "val_" not in key}
        return kept | {"validation": run.validation} | validate(run, run.model)
    return metrics


def refuse_another(run: Run, rank: Rank) -> None:
    """Ranks that see different files must not train together."""
    own = fingerprint(run.identity)
    first = rank.broadcast_object(own)
    if own != first:
        raise PipelineError(
            f"{run.name}: rank {rank.rank} of {rank.world_size}",
            expected=f"rank 0's run, {first}",
            found=f"another, {own}: settings, index, store or teacher differ here",
            do="give all ranks the same files; a network file system may show new ones late: start again then",
        )


@contextlib.contextmanager
def alone(run: Run, rank: Rank) -> Iterator[None]:
    """Hold the run's lock until the block ends; while another job holds it, look again and again.

    Rank 0 holds it. Each look is an exchange of its own: in a single one that waits, nccl would give up.
    """
    with contextlib.ExitStack() as stack:
        waits = False
        while not rank.broadcast_object(rank.rank != 0 or _locked(run, stack)):
            if rank.rank == 0 and not waits:
                print(f"{run.name}: another process trains this run ({run.folder}); waits until it ends", flush=True)
            waits = True
            time.sleep(LOOK)
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
        with atomic_write(run.folder / "run.json") as temporary:
            told = {"name": run.name, "steps": run.steps} | run_summary(run.identity)
            temporary.write_text(json.dumps(told, indent=1) + "\n")
    metrics = train(run)
    if rank.rank == 0:
        about = {"run": fingerprint(run.identity), "ranks": world_size(), "metrics": metrics}
        with atomic_write(run.folder / "final.safetensors") as temporary:
            save_weights(temporary, run.model.model, about)
    return metrics


def _load(run: Run, rank: Rank) -> dict[str, Any]:
    """The final weights, which rank 0 reads and hands on."""
    metrics: dict[str, Any] = {}
    if rank.rank == 0:
        final = run.folder / "final.safetensors"
        state, about = read_saved_weights(final)
        load_weights(run.model.model, state, str(final))
        metrics = about["metrics"]
    run.model.to(run.device)
    rank.broadcast(run.model.state_dict().values())
    return rank.broadcast_object(metrics)


def finish(training: Run, folder: Path) -> None:
    """Train to the end unless that was done before, and publish the results."""
    metrics = complete(training)
    if Rank.init_process_group(training.device).rank:
        return  # rank 0 publishes
    with atomic_write(folder / "weights.safetensors") as temporary:
        save_weights(temporary, training.model.model, {"run": fingerprint(training.identity)})
    write_curve(folder / "curve.csv", training.folder / "log.jsonl", metrics)
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics | {"run": fingerprint(training.identity)}, indent=1) + "\n")
    figures = {key: value for key, value in metrics.items() if not isinstance(value, str)}
    print(f"{training.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
