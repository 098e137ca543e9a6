"""Several processes under torchrun (gloo on a CPU): the same losses, the same store, restarts."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_report import mini  # noqa: F401  (fixture)
from test_training import CPU, loaded, newest_checkpoint

from pipeline.batches.loader import step_loader
from pipeline.batches.plan import training_plan
from pipeline.cli.options import process_group
from pipeline.common.distributed import Rank
from pipeline.common.errors import PipelineError
from pipeline.common.lock import kernel_lock
from pipeline.common.signals import Interrupted
from pipeline.config.params import dump
from pipeline.config.paths import (
    RUN_LOCK,
    evaluation_folder,
    index_path,
    student_folder,
    teacher_folder,
    teacher_logits_folder,
)
from pipeline.config.schema import Config
from pipeline.models.build import build_teacher
from pipeline.shards.index import Index
from pipeline.training import scaling
from pipeline.training.log import read_log
from pipeline.training.run import Run
from pipeline.training.trainer import Trainer
from stages import evaluate, train_student

ROOT = Path(__file__).parent.parent
ONE_NODE = ("--standalone", "--nproc-per-node=2")


def launch(
    *arguments: str, die: str = "-", restarts: int = 0, nodes=ONE_NODE, folder: Path | None = None, **switches: str
) -> subprocess.Popen:
    """The command under torchrun, in a process group of its own: in two ranks, or in one of several nodes'."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*torchrun, str(ROOT / "tests/ranks.py"), die, *arguments, "--device", "cpu"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | switches,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said_by(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def two_ranks(*arguments: str, **options) -> str:
    return said_by(launch(*arguments, **options))


def two_nodes(*arguments: str, **options) -> str:
    """As docs/cluster.md has it, but both nodes are this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=1")
    switch = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    both = [launch(*arguments, nodes=nodes, **options, **switch) for _ in range(2)]
    return "".join([said_by(process) for process in both])


PLAIN = "student.drop_path=0", "student.epochs=8"  # what drop-path draws depends on the rank
COMMANDS = (
    "teacher-logits",
    "-- train-student --student hard " + " ".join(f"--set {change}" for change in PLAIN),
    "-- train-student --student hard",
    "-- teacher --set teacher.seed=5",
)


@pytest.fixture(scope="module")
def of_two_ranks(taught_template, tmp_path_factory) -> tuple[Path, str]:
    """A folder in which two ranks did COMMANDS, where there was a teacher only; and what they said."""
    root = tmp_path_factory.mktemp("two") / "ranks"
    shutil.copytree(taught_template, root)
    shutil.rmtree(root / "work/stores")
    shutil.rmtree(root / teacher_logits_folder(Config(name="small"), "train-student"))
    return root, two_ranks(*" ".join(COMMANDS).split(), folder=root)


def test_thirty_steps_of_two_ranks_have_the_losses_of_one(taught, of_two_ranks):
    train_student.run(loaded(*PLAIN), CPU, "hard")
    log = newest_checkpoint().parent / "log.jsonl"
    alone, found = ([x["loss"] for x in read_log(at / log) if x["kind"] == "step"] for at in (Path(), of_two_ranks[0]))
    assert len(alone) >= 30
    assert found == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("launched", [two_ranks, pytest.param(two_nodes, marks=pytest.mark.slow)])
def test_a_killed_rank_is_restarted_and_the_run_goes_on_to_the_same_weights(taught, of_two_ranks, launched):
    final = student_folder(taught, "hard") / "weights.safetensors"
    said = launched("train-student", "--student", "hard", die="9", restarts=1)
    assert Path("died").exists() and "resumes at step 9" in said
    assert final.read_bytes() == (of_two_ranks[0] / final).read_bytes()


@pytest.mark.slow
def test_ranks_agree_on_the_steps_that_overflow_in_float16_and_go_on_with_the_same_scale(taught, monkeypatch):
    half = "student.precision=float16", "student.epochs=5", "student.lr=0.002", *PLAIN[:1]
    half += ("student.checkpoint_activations=true",)
    command = ["train-student", "--student", "hard", *(word for change in half for word in ("--set", change))]
    final, logged = student_folder(taught, "hard") / "weights.safetensors", []
    for die, restarts in (("-", 0), ("7", 1)):
        said = two_ranks(*command, die=die, restarts=restarts, FIRST_SCALE=str(2**22))
        log = newest_checkpoint().parent / "log.jsonl"
        logged.append([(x["loss"], x["loss_scale"], x["skipped_steps"]) for x in read_log(log) if x["kind"] == "step"])
        logged[-1].append(final.read_bytes())
        shutil.rmtree(log.parent)
    assert "resumes at step 7" in said and logged[0] == logged[1]
    monkeypatch.setattr(
        scaling, "GradScaler", functools.partial(scaling.GradScaler, init_scale=2.0**22, growth_interval=3)
    )
    train_student.run(loaded(*half), CPU, "hard")
    alone = [x for x in read_log(log) if x["kind"] == "step"]
    *found, _ = logged[0]
    assert found[-1][2] > 2 and alone[-1]["skipped_steps"] > 2
    assert [loss for loss, *_ in found] == pytest.approx([x["loss"] for x in alone], rel=2e-2)


@pytest.mark.slow
def test_ranks_go_on_from_rank_0s_checkpoint_though_another_sees_an_older_one(taught, of_two_ranks):
    final = student_folder(taught, "hard") / "weights.safetensors"
    said = two_ranks("train-student", "--student", "hard", die="9", restarts=1, OLD_LISTING="1")
    assert Path("died").exists() and "resumes at step 9" in said
    assert final.read_bytes() == (of_two_ranks[0] / final).read_bytes()


@pytest.mark.slow
def test_a_network_with_batch_norm_goes_on_in_two_ranks_to_the_same_weights(taught, of_two_ranks):
    final = teacher_folder(taught) / "weights.safetensors"
    settings = "--set", "teacher.seed=5", "--set", "teacher.checkpoint_minutes=0"
    said = two_ranks("teacher", *settings, die="2", restarts=1)
    assert Path("died").exists() and "resumes at step 2" in said
    assert final.read_bytes() == (of_two_ranks[0] / final).read_bytes()


@pytest.mark.slow
def test_a_student_with_batch_norm_goes_on_in_two_ranks_to_the_same_weights(taught):
    final = student_folder(taught, "hard") / "weights.safetensors"
    settings = (
        "student.model=regnety_002", "student.kwargs={depth: 8, output_stride: 8}", "student.epochs=2",
        "students=[hard]", "variants={hard: {}}",
    )  # fmt: skip
    command = ["train-student", "--student", "hard", *(part for text in settings for part in ("--set", text))]
    two_ranks(*command)
    expected = final.read_bytes()
    shutil.rmtree("work/state")
    final.unlink()
    said = two_ranks(*command, die="3", restarts=1)
    assert Path("died").exists() and "resumes at step 3" in said
    assert final.read_bytes() == expected
    assert b"running_mean" in expected


@pytest.mark.slow
def test_ranks_wait_for_another_job_longer_than_an_exchange_may_last(taught, capsys):
    train_student.run(taught, CPU, "hard", dry_run=True)
    state = Path(re.search(r"state: (\S+)", capsys.readouterr().out)[1])
    with kernel_lock(state / RUN_LOCK):
        process = launch("train-student", "--student", "hard", EXCHANGE_SECONDS="5")
        while "waiting until it ends" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(8)
    said_by(process)
    assert (state / "final.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("saving", ["", "1"], ids=["", "while one of them saves"])
def test_sigterm_to_one_rank_ends_both_at_the_same_step(taught, saving):
    Path("params.yaml").write_text(dump(loaded("student.epochs=2000", "student.checkpoint_minutes=60")))
    process = launch("train-student", "--student", "hard", SAVING=saving)
    log = lambda: [p for p in Path("work/state").glob("*/log.jsonl") if '"step": 20,' in p.read_text()]  # noqa: E731
    while not log() and process.poll() is None:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "ranks.py"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[1]), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert said.count("ended by SIGTERM at step") == 2, said
    ended = {line.split("at step ")[1].split(";")[0] for line in said.splitlines() if "ended by SIGTERM" in line}
    assert len(ended) == 1 and newest_checkpoint().name == f"step-{int(ended.pop()):09d}.ckpt"


def test_teacher_logits_of_two_ranks_fill_the_store_of_one(taught, of_two_ranks):
    manifest = teacher_logits_folder(taught, "train-student") / "manifest.json"
    assert (of_two_ranks[0] / manifest).read_bytes() == manifest.read_bytes()


def test_two_ranks_train_and_publish_a_teacher_once(taught, of_two_ranks):
    root, said = of_two_ranks
    weights = teacher_folder(taught) / "weights.safetensors"
    assert len(re.findall(r"^teacher: top-1 [\d.]+, top-5", said, re.MULTILINE)) == 1
    assert (root / weights).read_bytes() != weights.read_bytes()  # of another seed


def test_evaluation_in_two_ranks_is_that_of_one(mini):  # noqa: F811
    config, device = mini
    evaluate.run(config, device)
    metrics = evaluation_folder(config) / "metrics.json"
    alone = json.loads(metrics.read_text())
    metrics.unlink()
    Path("params.yaml").write_text(dump(config))
    two_ranks("evaluate")
    assert json.loads(metrics.read_text()) == alone


def learn_statistics(rank: int, folder: Path, port: int) -> None:
    """One of two ranks: a step of a network with batch norm, then validation; writes its buffers of before and after."""
    for key, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        os.environ[key] = str(value)
    os.chdir(folder)
    run = teacher_run(loaded())
    trainer = Trainer(run)
    trainer.train_step(iter(step_loader(run.plan, run.train, range(1), range(rank, rank + 1), 2, 0, False)))
    before = [buffer.clone() for buffer in run.model.buffers()]
    synchronised = trainer.wrapped_model.will_sync_module_buffers()
    trainer.validate(run.model, "")
    torch.save([synchronised, before, list(run.model.buffers())], folder / f"rank-{rank}.pt")
    Rank.destroy_process_group()


def teacher_run(config: Config) -> Run:
    index, settings = Index(index_path(config, "train")), config.teacher
    return Run(
        "teacher", Path("run"), {}, settings, training_plan(index, config.recipe, settings, 8), index,
        Index(index_path(config, "val")), build_teacher(settings, len(index.classes)), config.recipe.size, 1.0,
    )  # fmt: skip


@pytest.mark.slow
def test_ranks_exchange_batch_norms_statistics_before_validation_alone(taught):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(learn_statistics, (Path.cwd(), port), 2)
    (sync, before, after), (_, other_before, other_after) = (torch.load(f"rank-{rank}.pt") for rank in range(2))
    equal = [torch.equal(a, b) for a, b in zip(before, other_before, strict=True)]
    assert not sync and not all(equal)  # each has its own, of its own groups
    for own, kept, other in zip(before, after, other_after, strict=True):
        assert torch.equal(own, kept) and torch.equal(kept, other)


@pytest.fixture
def alone_in_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    Rank.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "leaves"), [(None, True), (Interrupted("run", 3, signal.SIGTERM), True), (PipelineError("no"), False)]
)
def test_a_command_leaves_the_process_group_where_all_ranks_end(alone_in_a_group, error, leaves):
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), process_group():
        if error:
            raise error
    assert dist.is_initialized() != leaves


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 3), (0, 2)])
def test_shares_are_all_of_it_in_order_and_nearly_equal(count, world):
    shares = Rank(0, world).ranges(count)
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_on_gpus_tell_one_another_objects_by_way_of_the_cpu(monkeypatch):
    """Without waiting for what the GPUs compute, and whatever nccl does."""
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setenv("WORLD_SIZE", "2")
    Rank.current(torch.device("cuda"))
    assert joined == ["cpu:gloo,cuda:nccl"]


def test_one_rank_gathers_its_own():
    own = torch.arange(6).reshape(3, 2)
    assert Rank().all_gather(own, 3, CPU) is own
