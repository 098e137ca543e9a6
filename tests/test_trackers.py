"""Experiment trackers: every line of the log once, however often a run is resumed, and never an end of the training."""

import json
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import CPU, Stop, loaded, newest_checkpoint

from pipeline.cli.main import main
from pipeline.common.errors import UsageError
from pipeline.config.schema import Logging
from pipeline.training.log import read_log
from pipeline.training.recorder import Recorder
from pipeline.training.trackers import check_trackers, scalars
from pipeline.training.trainer import Trainer
from stages import train_student

BRIEF = "student.epochs=2", "student.eval_epochs=1", "student.log_steps=2"
WANDB = "logging.wandb=photos", "logging.module=pretended_tracker"
TENSORBOARD = "logging.tensorboard=true"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What is called in a module with wandb's functions."""
    found: list[tuple] = []
    module = types.ModuleType("pretended_tracker")

    def init(project: str, name: str | None = None, group: str | None = None, config=None, resume: str = "never"):
        found.append(("init", project, name, group, config, resume))

    module.init = init
    module.log = lambda values, step=None: found.append(("log", step, values))
    module.finish = lambda: found.append(("finish",))
    monkeypatch.setitem(sys.modules, "pretended_tracker", module)
    return found


def logged() -> list[dict]:
    return read_log(newest_checkpoint().parent / "log.jsonl")


def interrupted(config, step: int, monkeypatch) -> None:
    """Train up to a step, as if the process was killed before it."""
    real = Trainer.train_step

    def stopping(self, batches):
        if self.step == step:
            raise Stop
        return real(self, batches)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "train_step", stopping)
        train_student.run(config, CPU, "hard")


def test_a_tracker_gets_every_line_of_the_log_in_order(taught, calls):
    config = loaded(*BRIEF, *WANDB)
    train_student.run(config, CPU, "hard")
    (_, project, name, group, settings, resume), *logs, end = calls
    state = newest_checkpoint().parent
    assert (project, name, group, resume) == ("photos", f"student-hard-{state.name[:8]}", config.name, "allow")
    assert settings["student"]["epochs"] == 2 and json.dumps(settings)
    assert end == ("finish",) and logs == [("log", line["step"], scalars(line)) for line in logged()]
    assert {"step/loss", "step/lr", "epoch/val_top1_class", "epoch/speed/seconds"} <= {key for log in logs for key in log[2]}


def test_a_tracker_that_takes_an_id_gets_the_runs(taught, calls, monkeypatch):
    found = {}
    monkeypatch.setattr(sys.modules["pretended_tracker"], "init", lambda **arguments: found.update(arguments))
    train_student.run(loaded(*BRIEF, *WANDB), CPU, "hard")
    assert found["id"] == newest_checkpoint().parent.name and found["resume"] == "allow"


@pytest.mark.parametrize("minutes", [0, 60], ids=["from a checkpoint", "from the start"])
def test_a_resumed_run_repeats_nothing(taught, calls, monkeypatch, minutes):
    config = loaded(*BRIEF, *WANDB, TENSORBOARD, f"student.checkpoint_minutes={minutes}")
    for step in (3, 6):
        interrupted(config, step, monkeypatch)
    train_student.run(config, CPU, "hard")
    sent = [(step, set(values)) for kind, step, values in (call for call in calls if call[0] == "log")]
    lines = logged()
    assert sent == [(line["step"], set(scalars(line))) for line in lines]
    assert events(config) == {
        name: [(line["step"], pytest.approx(scalars(line)[name])) for line in lines if name in scalars(line)]
        for name in {name for line in lines for name in scalars(line)}
    }
    assert len({call[2] for call in calls if call[0] == "init"}) == 1  # one run there


def events(config) -> dict[str, list[tuple[int, float]]]:
    """The values of TensorBoard's only run, by name."""
    (folder,) = Path("outputs", config.name, "tensorboard").iterdir()
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_the_time_of_a_point_is_that_of_its_line_in_the_log(taught, monkeypatch):
    config = loaded(*BRIEF, TENSORBOARD)
    interrupted(config, 3, monkeypatch)
    train_student.run(config, CPU, "hard")
    (folder,) = Path("outputs", config.name, "tensorboard").iterdir()
    reader = EventAccumulator(str(folder))
    reader.Reload()
    times = [event.wall_time for event in reader.Scalars("step/loss")]
    assert times == pytest.approx([line["time"] for line in logged() if line["kind"] == "step"], abs=0.01)


def test_a_tracker_that_is_configured_later_gets_the_lines_before_too(taught, calls, monkeypatch):
    interrupted(loaded(*BRIEF), 6, monkeypatch)
    train_student.run(loaded(*BRIEF, *WANDB), CPU, "hard")
    assert [call[1] for call in calls if call[0] == "log"] == [line["step"] for line in logged()]


@pytest.mark.parametrize("function", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_stops_nothing(taught, calls, monkeypatch, capsys, function):
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules["pretended_tracker"], function, broken)
    config = loaded(*BRIEF, *WANDB, TENSORBOARD)
    train_student.run(config, CPU, "hard")
    said = capsys.readouterr().err
    assert said.count("warning: logging.wandb failed and has been disabled: ConnectionError: no network") == 1
    assert "step/loss" in events(config)


def test_a_missing_package_stops_no_training(taught, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    train_student.run(loaded(*BRIEF, TENSORBOARD, "logging.wandb=photos", "logging.module=no_such_module"), CPU, "hard")
    said = capsys.readouterr().err
    assert said.count("warning: logging.") == 2 and "no_such_module" in said


def test_a_dry_run_names_a_missing_package(taught):
    arguments = ["train-student", "--student", "hard", "--dry-run", "--device", "cpu"]
    assert CliRunner().invoke(main, [*arguments, "--set", TENSORBOARD]).exit_code == 0
    result = CliRunner().invoke(main, [*arguments, "--set", "logging.wandb=x", "--set", "logging.module=no_such.module"])
    assert result.exit_code == 2 and "pip install no_such, or remove logging.wandb" in result.output
    check_trackers(Logging(module="no_such"))


@pytest.mark.parametrize("module", ["a b", "../wandb", "", "1x", "os;"])
def test_a_module_is_named_as_in_python(taught, module):
    with pytest.raises(UsageError, match=r"logging\.module"):
        loaded(f"logging.module={module!r}")


def test_other_ranks_open_no_tracker_and_without_one_nothing_is_imported(taught, calls, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    train_student.run(loaded(*BRIEF, "logging.module=pretended_tracker"), CPU, "hard")
    assert not calls and "tensorboard" not in sys.modules
    run = types.SimpleNamespace(folder=Path("nowhere"), trackers={"logging.wandb": lambda: pytest.fail("opened")})
    recorder = Recorder(run, 1)
    recorder.start(0)
    recorder.close()
    assert not Path("nowhere").exists()


def test_logging_changes_no_identity(taught, calls):
    train_student.run(loaded(*BRIEF), CPU, "hard")
    train_student.run(loaded(*BRIEF, *WANDB, TENSORBOARD), CPU, "hard")  # done: nothing to log
    assert not calls


def test_a_line_becomes_numbers_with_names():
    line = {
        "kind": "epoch", "step": 4, "time": 1.5, "epoch": 1, "loss": 0.5, "validation": "abc", "lr": 1,
        "speed": {"seconds": 2.0},
    }  # fmt: skip
    assert scalars(line) == {"epoch/epoch": 1, "epoch/loss": 0.5, "epoch/lr": 1, "epoch/speed/seconds": 2.0}
