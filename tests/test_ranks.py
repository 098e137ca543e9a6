"""Several processes under torchrun (gloo on a CPU): the same losses, the same store, restarts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_report import mini  # noqa: F401  (fixture)
from test_training import CPU, loaded, losses, newest_checkpoint, taught, taught_template  # noqa: F401  (fixtures)

from pipeline.layout import answers_folder, evaluation_folder, student_folder, teacher_folder
from pipeline.params import dump
from pipeline.ranks import Rank
from stages import evaluate, train_student

ROOT = Path(__file__).parent.parent
ONE_NODE = ("--standalone", "--nproc-per-node=2")


def launch(*arguments: str, die: str = "-", restarts: int = 0, nodes=ONE_NODE, **switches: str) -> subprocess.Popen:
    """The command under torchrun, in a process group of its own: in two ranks, or in one of several nodes'."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*torchrun, str(ROOT / "tests/ranks.py"), die, *arguments, "--device", "cpu"],
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


def test_thirty_steps_of_two_ranks_have_the_losses_of_one(taught):  # noqa: F811
    Path("params.yaml").write_text(dump(loaded("student.drop_path=0", "student.epochs=8")))
    train_student.run(loaded(), CPU, "hard")
    alone = losses(loaded())
    shutil.rmtree("work/state")
    two_ranks("train-student", "--student", "hard")
    assert len(alone) >= 30
    assert losses(loaded()) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("launched", [two_ranks, pytest.param(two_nodes, marks=pytest.mark.slow)])
def test_a_killed_rank_is_restarted_and_the_run_goes_on_to_the_same_weights(taught, launched):  # noqa: F811
    final = student_folder(taught, "hard") / "weights.safetensors"
    two_ranks("train-student", "--student", "hard")
    expected = final.read_bytes()
    final.unlink()
    shutil.rmtree("work/state")
    said = launched("train-student", "--student", "hard", die="9", restarts=1)
    assert Path("died").exists() and "goes on from step 9" in said
    assert final.read_bytes() == expected


def test_sigterm_to_one_rank_ends_both_at_the_same_step(taught):  # noqa: F811
    Path("params.yaml").write_text(dump(loaded("student.epochs=2000", "student.checkpoint_minutes=60")))
    process = launch("train-student", "--student", "hard")
    log = lambda: [p for p in Path("work/state").glob("*/log.jsonl") if '"step": 20,' in p.read_text()]  # noqa: E731
    while not log() and process.poll() is None:
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "ranks.py"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[1]), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert said.count("ended by SIGTERM at step") == 2, said
    ended = {line.split("at step ")[1].split(";")[0] for line in said.splitlines() if "ended by SIGTERM" in line}
    assert len(ended) == 1 and newest_checkpoint().name == f"step-{int(ended.pop()):09d}.ckpt"


def test_teacher_logits_of_two_ranks_fill_the_store_of_one(taught):  # noqa: F811
    manifest = answers_folder(taught, "train-student") / "manifest.json"
    expected = manifest.read_bytes()
    manifest.unlink()
    shutil.rmtree("work/stores")
    two_ranks("teacher-logits")
    assert manifest.read_bytes() == expected


def test_two_ranks_train_and_publish_a_teacher_once(taught):  # noqa: F811
    shutil.rmtree("work/state")
    shutil.rmtree(teacher_folder(taught))
    said = two_ranks("teacher")
    assert said.count("teacher: top-1") == 1
    assert (teacher_folder(taught) / "weights.safetensors").exists()


def test_evaluation_in_two_ranks_is_that_of_one(mini):  # noqa: F811
    config, device = mini
    evaluate.run(config, device)
    metrics = evaluation_folder(config) / "metrics.json"
    alone = json.loads(metrics.read_text())
    metrics.unlink()
    Path("params.yaml").write_text(dump(config))
    two_ranks("evaluate")
    assert json.loads(metrics.read_text()) == alone


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 3), (0, 2)])
def test_shares_are_all_of_it_in_order_and_nearly_equal(count, world):
    shares = Rank(0, world).shares(count)
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_rank_gathers_its_own():
    own = torch.arange(6).reshape(3, 2)
    assert Rank().gather(own, 3, CPU) is own
