"""`pipeline study`: the cells of a matrix, what counts as done, and the table."""

import json
import math
import os
from pathlib import Path

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from conftest import make_data_set, tree
from safetensors.torch import save_file

from pipeline.cli import study as command
from pipeline.cli import study_table
from pipeline.cli.main import main
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config import cells as cells_module
from pipeline.config import schema
from pipeline.config.cells import Cell, expand
from pipeline.config.params import dump, load_config, parse_yaml, resolve
from pipeline.config.paths import evaluated_models, evaluation_folder
from pipeline.config.schema import Config, Data, Evaluate, Student
from pipeline.config.study import Figure, Study, load_study
from pipeline.config.validation import validate
from pipeline.models.weights import read_weights, save_weights
from pipeline.report import study_figure
from pipeline.report.study import Summary, Value, read_cells, summarize, table_rows, write_cells, write_tables
from pipeline.report.study_figure import draw_figure
from pipeline.training.identity import configured_runs

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))
BASE = load_config(ROOT / "configs/digits.yaml")


def cells(base: Config = BASE, **study) -> list[Cell]:
    return expand(validate(Study, {"base": "digits", **study}, "test"), "test", base, "test")


def call(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    return done.output


# expansion


@pytest.mark.parametrize(
    ("axes", "rows"),
    [
        ({"finetune.size": [24, 48]}, [{"student": "none", "size": ""}, None]),
        ({"finetune.size": [24, 48], "student.epochs": [2]}, [{"student": "none", "size": "", "epochs": "2"}, None]),
        ({"part": {"default": {}, "tuning": {"finetune.lr": 0.1}}}, [{"student": "none", "part": "default"}, None]),
        ({"part": {"both": {"finetune.lr": 0.1, "student.lr": 0.1}}}, [{"student": "none", "part": "both"}]),
    ],
)
def test_a_student_that_only_fine_tuning_changes_is_one_row_before_it(axes, rows):
    study = validate(Study, {"base": "digits", "students": ["none"], "finetune": True, "axes": axes}, "test")
    found = [cell for cell in expand(study, "test", BASE, "test") if not cell.finetuned]
    assert [cells_module.levels_before_finetuning(study, cell.levels) for cell in found] == rows


def test_a_store_that_is_fetched_from_elsewhere_is_another_configuration():
    names = [cells(set=changes)[0].config.name for changes in ({}, {"teacher_logits.fetch": "a"}, {"teacher_logits.fetch": "b"})]
    assert len(set(names)) == 3


def test_how_further_images_are_decoded_is_part_of_their_evaluation():
    upright, raw = Data(), Data(exif_orientation=False)
    sets, labels = Evaluate(sets={"v2": "there"}), Evaluate(real_labels="timm")
    assert sets.sets_identity(upright) != sets.sets_identity(raw) and labels.sets_identity(upright) == labels.sets_identity(raw)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_students_replay_no_view_unless_the_study_is_about_it(path):
    study = load_study(path)
    config = load_config(ROOT / f"configs/{study.base}.yaml")
    for cell in expand(study, path.stem, config, path.stem):
        config, student = cell.config, cell.config.student_named(cell.variant)
        settings, views = (config.finetune, config.finetune.views) if cell.finetuned else (student, config.teacher_logits.views)
        if not any("views" in axis for axis in study.axes) and cell.levels.get("predictions") != "one-view":
            assert views >= settings.epochs, cell.name


def test_levels_of_students_are_variants_of_one_configuration_and_all_others_are_configurations():
    found = cells(students=["none", "hard"], axes={"student.epochs": [2, 4], "teacher_logits.views": [10, 20]}, seeds=[0, 1])
    assert len(found) == 16 and len({cell.config.name for cell in found}) == 2
    by_views = {cell.levels["views"]: cell.config for cell in found}
    assert {label: config.teacher_logits.views for label, config in by_views.items()} == {"10": 10, "20": 20}
    for cell in found:
        student = cell.config.student_named(cell.variant)
        assert student.epochs == int(cell.levels["epochs"]) and student.seed == cell.seed
        assert student.distillation == cell.levels["student"]
        assert cell.variant == f"{cell.levels['student']}-epochs{cell.levels['epochs']}-seed{cell.seed}"


def test_every_cell_of_the_first_seed_comes_before_those_of_the_next():
    found = cells(axes={"teacher_logits.views": [10, 20]}, seeds=[3, 1])
    assert [cell.seed for cell in found] == [3] * 8 + [1] * 8


def test_axes_may_change_different_entries_of_kwargs():
    axes = {"student.kwargs.embed_dim": [64, 256], "student.kwargs.depth": [2, 6]}
    found = [cell.config.student_named(cell.variant).kwargs for cell in cells(students=["none"], axes=axes)]
    assert [(kwargs["embed_dim"], kwargs["depth"]) for kwargs in found] == [(64, 2), (64, 6), (256, 2), (256, 6)]


def test_stores_of_other_draws_may_have_another_precision():
    kinds = {
        "drawn": {"teacher_logits.kind": "sampled", "teacher_logits.sample_tau": 3.0, "teacher_logits.precision": "bfloat16"},
        "dense": {"teacher_logits.kind": "dense", "teacher_logits.precision": "float32"},
    }
    assert len(cells(students=["hard"], axes={"kind": kinds})) == 2


def test_two_precisions_have_stores_in_folders_of_their_own():
    levels = {name: {"teacher_logits.precision": name, "work": f"work-{name}"} for name in ("float32", "bfloat16")}
    assert {cell.config.work for cell in cells(students=["hard"], axes={"precision": levels})} == {"work-float32", "work-bfloat16"}


def test_a_variant_s_kwargs_are_merged_and_its_own_settings_give_way_to_the_level():
    cell = cells(students=["soft"], axes={"size": {"big": {"student.kwargs": {"embed_dim": 256}, "student.tau": 9.0}}})[0]
    settings = cell.config.student_named(cell.variant)
    assert settings.kwargs == BASE.student.kwargs | {"embed_dim": 256}
    assert (settings.tau, settings.alpha) == (9.0, BASE.student_named("soft").alpha)


def test_skip_leaves_out_combinations():
    found = cells(
        students=["hard", "soft"], axes={"teacher_logits.kind": ["argmax", "dense"]},
        skip=[{"student": "soft", "kind": "argmax"}, {"student": "hard", "kind": ["dense"]}],
    )  # fmt: skip
    assert [(cell.levels["student"], cell.levels["kind"]) for cell in found] == [("hard", "argmax"), ("soft", "dense")]


def names(**study) -> set[str]:
    return {cell.name for cell in cells(axes={"V": {"some": study}}, students=["hard"])}


def test_a_changed_level_or_base_names_another_configuration_and_how_it_runs_does_not():
    first = names(**{"teacher_logits.views": 10})
    assert first.isdisjoint(names(**{"teacher_logits.views": 20}))
    assert first == names(**{"teacher_logits.views": 10, "teacher_logits.workers": 2, "student.log_steps": 3})


def test_a_further_key_with_its_default_renames_no_configuration(monkeypatch):
    class Extended(Student):
        further: int = 3

    def extended(**own) -> Config:
        return BASE.model_copy(update={"student": Extended(**BASE.student.model_dump(), **own)})

    assert cells_module._digest(extended()) == cells_module._digest(BASE)
    assert cells_module._digest(extended(further=4)) != cells_module._digest(BASE)
    settings = BASE.student.model_dump(mode="json")
    before = cells_module._student_digest(settings, {"seed": 1}, "", "")
    monkeypatch.setattr(cells_module, "Student", Extended)
    monkeypatch.setattr(schema, "Student", Extended)
    assert cells_module._student_digest(settings, {"seed": 1}, "", "") == before
    assert cells_module._student_digest(settings, {"seed": 1, "further": 4}, "", "") != before


def test_a_default_that_is_written_out_renames_no_configuration():
    written = resolve(parse_yaml(dump(BASE), "test"), (), "test")
    assert [cell.name for cell in cells(written)] == [cell.name for cell in cells()]


def test_names_of_configurations_are_those_of_earlier_versions():
    """If this fails, results of earlier studies are no longer found: their folders have other names."""
    found = cells(Config(), axes={"teacher_logits.views": [300, 600]}, finetune=True)
    assert [cell.name for cell in found[::2]] == ["test-views300-c6cb23/hard-seed0-2afb9b", "test-views600-8f0cf6/hard-seed0-2afb9b"]


def test_further_seeds_and_students_keep_the_names_of_earlier_cells():
    few, more = cells(students=["hard"]), cells(students=["none", "hard"], seeds=[0, 1])
    assert {cell.name for cell in few} < {cell.name for cell in more}


def test_students_that_are_only_fine_tuned_are_not_trained_before():
    (cell,) = cells(students=["token"], finetune="only", set={"finetune.weights": "elsewhere.safetensors"})
    assert cell.stage.startswith("finetune@") and cell.config.students == []
    assert cell.config.finetune.students == [cell.variant] and cell.config.finetune.weights == "elsewhere.safetensors"
    commands = [" ".join(each[: each.index("--config")]) for each in command.setup_commands(cell.config, "only")]
    assert commands == ["prepare --quick", "teacher", "teacher --for finetune", "teacher-logits --for finetune"]


def test_seeds_of_students_that_are_only_fine_tuned_are_different_runs():
    found = cells(students=["token"], finetune="only", set={"finetune.weights": "elsewhere.safetensors"}, seeds=[0, 1])
    assert [cell.config.finetune.seed for cell in found] == [cell.seed for cell in found] == [0, 1]
    first, second = (configured_runs(cell.config, "index")[cell.stage] for cell in found)
    assert first != second and len({cell.name for cell in found}) == 2


def test_a_fine_tuned_student_is_a_cell_whose_name_says_what_it_started_from():
    found = cells(students=["token"], finetune=True)
    assert [cell.stage.partition("@")[0] for cell in found] == ["train-student", "finetune"]
    assert found[0].config.finetune.students == [found[0].variant]
    other = cells(students=["token"], finetune=True, axes={"x": {"y": {"student.epochs": 7}}})
    assert found[1].folder.name.partition("seed0")[2] != other[1].folder.name.partition("seed0")[2]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"axes": {"student": {"a": {}}}}, "other than .*seed.*student"),
        ({"axes": {"run": {"a": {}}}}, "found run"),
        ({"axes": {"student.epochs": [1], "finetune.epochs": [2]}}, "two called epochs"),
        ({"students": ["soft"], "set": {"student.alpha": 0.3}}, "variants.soft.alpha"),
        ({"students": ["soft"], "set": {"variants.soft.kwargs.depth": 2, "student.kwargs.depth": 6}}, "kwargs.depth: 2 there"),
        ({"set": {"student.seed": 3}}, "student.seed in set"),
        ({"set": {"student": {"alpha": 0.3}}}, "single keys.*found student in set"),
        ({"set": {"students": ["none"]}}, "found students in set"),
        ({"set": {"finetune.from": ["none"]}}, "`finetune` in place of finetune.from in set"),
        ({"finetune": "only", "axes": {"a": {"x": {"finetune.seed": 5}, "y": {"finetune.seed": 6}}}}, "`seeds` in place of"),
        ({"axes": {"student.alpha": [0.1, 0.2], "b": {"y": {"variants.soft.alpha": 0.5}}}}, "both alpha and b change"),
        ({"axes": {"a": {"x": {"student.seed": 3}}}}, "student.seed in a"),
        ({"axes": {"a": {"x": {"recipe.hflip": 0.1}}, "b": {"y": {"recipe.hflip": 0.2}}}}, "both a and b change recipe.hflip"),
        ({"axes": {"student.kwargs.depth": [2, 6], "b": {"y": {"student.kwargs": {"embed_dim": 64}}}}}, "depth and b change"),
        ({"students": ["hard"], "axes": {"teacher_logits.precision": ["float32", "bfloat16"]}}, "one value for each store"),
        (
            {
                "students": ["token"], "finetune": "only", "set": {"finetune.weights": "w.safetensors"},
                "axes": {"teacher_logits.precision": ["float32", "bfloat16"]},
            },
            "one value for each store",
        ),
        (
            {"students": ["soft"], "set": {"teacher_logits.kind": "topk"}, "axes": {"teacher_logits.top_k": [2, 3]}},
            "teacher_logits.top_k",
        ),
        ({"metrics": ["top1", "top1"]}, "metrics must be different"),
        ({"figure": {"x": "hflip", "log": True}, "axes": {"recipe.hflip": [0, 0.5]}}, "levels above 0"),
        ({"axes": {"V": {}}}, "at least one level"),
        ({"axes": {"student.lr": 0.1}}, "axes.student.lr must be a list of values.*found 0.1"),
        ({"axes": {"V": [1, 2]}}, "axes.V"),
        ({"axes": {"V": {"1": {"teacher_logits.view": 1}}}}, "did you mean views"),
        ({"axes": {"V": {"a/b": {}, "a b": {"recipe.hflip": 0.2}}}}, "names differ"),
        ({"axes": {"x": {"a/b": {"student.lr": 0.1}, "a b": {"student.lr": 0.2}}}}, "twice"),
        ({"students": ["nobody"]}, "none, soft, hard, token"),
        ({"skip": [{"W": "1"}]}, "no such axis"),
        ({"skip": [{"student": ["none", "soft", "hard", "token"]}]}, "at least one cell"),
        ({"seeds": [1, 1]}, "different"),
        ({"figure": {"x": "V"}}, "figure.x"),
        ({"figure": {"x": "top1"}}, "figure.x"),
        ({"figure": {"x": "loss", "along": "V"}, "metrics": ["top1", "loss"]}, "figure.along"),
        ({"figure": {"x": "views", "along": "student"}, "axes": {"teacher_logits.views": [10]}}, "figure.along"),
        ({"finetune": "yes"}, "finetune"),
        ({"axis": {}}, "did you mean axes"),
        ({"students": ["soft"], "axes": {"teacher_logits.kind": ["argmax"]}}, "teacher_logits.kind must be"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_study_is_named(study, message):
    with pytest.raises(UsageError, match=message):
        cells(**study)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_is_valid_and_its_first_line_says_what_it_is(path):
    study = load_study(path)
    base = load_config(ROOT / "configs" / f"{study.base}.yaml")
    found = expand(study, path.stem, base, path.stem)
    assert len({cell.name for cell in found}) == len(found)
    assert path.read_text().startswith("# ") and path.read_text().partition("\n")[0].endswith(".")


def test_the_views_of_the_shipped_study_share_one_store():
    study = load_study(ROOT / "configs/studies/cifar10-views.yaml")
    found = expand(study, "views", load_config(ROOT / f"configs/{study.base}.yaml"), "views")
    assert len({json.dumps(cell.config.recipe.model_dump(mode="json")) for cell in found}) == 1
    assert {cell.config.teacher_logits.views for cell in found} == {1, 3, 10, 30}


def test_the_shipped_ablations_are_those_of_table_8():
    study = load_study(ROOT / "configs/studies/imagenet-table8.yaml")
    found = {cell.levels["ablation"]: cell for cell in expand(study, "t", load_config(ROOT / "configs/imagenet-deit-base.yaml"), "t")}
    assert found.keys() - {"default"} == {path.stem for path in (ROOT / "configs/table8").glob("*.yaml")}
    for name in found.keys() - {"default"}:
        ablation, cell = load_config(ROOT / f"configs/table8/{name}.yaml"), found[name]
        ours, theirs = cell.config.student_named(cell.variant), ablation.student_named("none")
        assert ours == theirs.model_copy(update={"compile": True}) and cell.config.recipe == ablation.recipe
        mine = cell.config.finetune.model_copy(update={"students": ["none"], "compile": False})
        assert mine == ablation.finetune


# aggregation


def value(student: str, seed: int, number: float, metric: str = "top1") -> Value:
    return Value(f"x/{student}-seed{seed}", {"student": student, "views": "10"}, seed, f"run{seed}", metric, number)


VALUES = [value("none", 0, 0.90), value("none", 1, 0.92), value("hard", 0, 0.95), value("hard", 0, 1.25, "loss")]


def test_mean_and_standard_deviation_are_over_seeds():
    none, hard, loss = summarize(VALUES)
    assert none.mean == pytest.approx(0.91) and none.deviation == pytest.approx(math.sqrt(2) * 0.01)
    assert none.show() == "91.00 ± 1.41 (2 seeds)"
    assert hard.show() == "95.00 (1 seed)" and math.isnan(hard.deviation)
    assert loss.show() == "1.25 (1 seed)"


def test_two_values_of_one_seed_are_refused():
    with pytest.raises(UsageError, match="two of seed 0"):
        summarize([value("none", 0, 0.9), value("none", 0, 0.8)])


def test_a_table_has_a_row_per_levels_and_leaves_out_axes_of_one_level():
    headings, rows = table_rows(summarize(VALUES))
    assert headings == ["student", "top1, %", "loss"]
    assert rows == [["none", "91.00 ± 1.41 (2 seeds)", ""], ["hard", "95.00 (1 seed)", "1.25 (1 seed)"]]


def test_all_files_are_made_from_cells_csv_alone(tmp_path):
    write_cells(tmp_path / "cells.csv", VALUES)
    again = read_cells(tmp_path / "cells.csv")
    assert again == VALUES
    for folder, values in (("a", VALUES), ("b", again)):
        (tmp_path / folder).mkdir()
        write_tables(tmp_path / folder / "table.csv", tmp_path / folder / "table.md", summarize(values), [table_rows(summarize(values))])
        draw_figure(tmp_path / folder / "figure.png", summarize(values), "top1", Figure(x="views", log=True))
    assert tree(tmp_path / "a") == tree(tmp_path / "b") and len(tree(tmp_path / "a")) == 3
    lines = (tmp_path / "a/table.csv").read_text().splitlines()
    assert lines[0] == "student,views,metric,mean,standard_deviation,seeds" and lines[2] == "hard,10,top1,0.95,,1"


def test_tables_and_figures_of_a_folder_of_cells_are_made_again_without_data_or_params(in_tmp):
    Path("configs").symlink_to(ROOT / "configs")
    write_cells(Path("results/digits-quick.csv"), VALUES)
    write_cells(Path("results/other.csv"), VALUES)
    printed = call("study", "--from", "results")
    assert "digits-quick: from results/digits-quick.csv" in printed and "91.00 ± 1.41 (2 seeds)" in printed
    made = {"digits-quick.md", "digits-quick.png", "digits-quick-table.csv"}
    assert {path.name for path in Path("results").iterdir()} == made | {"digits-quick.csv", "other.csv"}
    before = tree(Path("results"))
    assert f"results: {', '.join(sorted(made))}" in call("study", "digits-quick", "--from", "results/digits-quick.csv", "--to", "results")
    assert tree(Path("results")) == before
    assert not Path("outputs").exists()


def test_a_figure_along_an_axis_that_the_cells_do_not_have_is_drawn(tmp_path):
    metrics = {"top1": 0.5, "throughput.images_per_second": 900.0}
    summaries = summarize([Value("x/none-0", {"student": "none"}, 0, "run", name, number) for name, number in metrics.items()])
    draw_figure(tmp_path / "figure.png", summaries, "top1", Figure(x="throughput.images_per_second", along="size"))
    assert (tmp_path / "figure.png").exists()


def test_a_figure_over_a_metric_has_a_point_for_every_row(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(study_figure, "_plot", lambda lines, log: drawn.update(lines) or REAL_PLOT(lines, log))
    values = [
        Value(f"x/{student}-{size}-{seed}", {"student": student, "size": size}, seed, "run", metric, number * (1 + seed))
        for student in ("none", "token") for size, speed in (("S", 900.0), ("Ti", 2500.0)) for seed in (0, 1)
        for metric, number in (("top1", speed / 10000), ("throughput.images_per_second", speed))
    ]  # fmt: skip
    summaries = summarize(values)
    draw_figure(tmp_path / "figure.png", summaries, "top1", Figure(x="throughput.images_per_second", along="size", log=True))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert drawn.keys() == {"none", "token"}
    small, tiny = drawn["token"]
    assert (small.text, small.x, small.y) == ("S", 1350.0, pytest.approx(13.5))
    assert (tiny.text, tiny.x, tiny.y) == ("Ti", 3750.0, pytest.approx(37.5))
    assert tiny.y_deviation == pytest.approx(25 / math.sqrt(2)) and tiny.x_deviation == pytest.approx(2500 / math.sqrt(2))


def test_a_line_is_interrupted_where_it_has_no_result_yet(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(study_figure, "_plot", lambda lines, log: drawn.update(lines) or REAL_PLOT(lines, log))
    levels = [("none", "1"), ("none", "30"), ("token", "1"), ("token", "3"), ("token", "30")]
    values = [Value("x", {"student": student, "views": views}, 0, "run", "top1", 0.5) for student, views in levels]
    draw_figure(tmp_path / "figure.png", summarize(values), "top1", Figure(x="views", log=True))
    missing = {label: [point.x for point in points if math.isnan(point.y)] for label, points in drawn.items()}
    assert missing == {"none": [3.0], "token": []}


REAL_PLOT = study_figure._plot


def test_a_file_that_is_no_cells_csv_is_refused(tmp_path):
    (tmp_path / "cells.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="pipeline study wrote"):
        read_cells(tmp_path / "cells.csv")


@pytest.mark.parametrize("line", ["x,0,a,top1,0.5,1", "x,0,a,top1", "x,0,a,top1,nan"])
def test_a_line_of_cells_that_is_ragged_or_not_finite_is_refused(tmp_path, line):
    (tmp_path / "cells.csv").write_text(f"cell,seed,run,metric,value\n{line}\n")
    with pytest.raises(UsageError, match="pipeline study wrote"):
        read_cells(tmp_path / "cells.csv")


def test_levels_that_are_no_numbers_are_drawn_as_dots(tmp_path):
    draw_figure(tmp_path / "figure.png", summarize([VALUES[0]]), "top1", Figure(x="student"))
    assert (tmp_path / "figure.png").exists()


def test_summaries_of_large_numbers_are_short():
    assert Summary({}, "evaluation.parameters", (5_717_416.0,)).show() == "5,717,416 (1 seed)"


# what is done, in a project with trained students: in process


TINY = {
    "student": {
        "model": "deit_tiny_patch16_224", "kwargs": {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 1},
        "epochs": 1, "warmup_epochs": 0, "batch_size": 8, "distillation": "none", "precision": "float32", "workers": 0,
        "ema_decay": None,
    },
    "students": ["none"], "variants": {"none": {}, "slow": {"lr": 1e-5}},
    "evaluate": {"workers": 0, "crop": 1.0},
}  # fmt: skip
STUDY = {"base": "base.yaml", "students": ["none"], "axes": {"student.lr": [0.001, 0.01]}, "seeds": [0, 1]}


@pytest.fixture
def project(in_tmp):
    config, _ = make_data_set(in_tmp, {"cat": 6, "dog": 6}, {"cat": 2, "dog": 2}, **TINY)
    Path("base.yaml").write_text(dump(config))
    write_study()


TUNING = {
    "finetune.size": 16, "finetune.epochs": 1, "finetune.batch_size": 8, "finetune.precision": "float32", "finetune.workers": 0,
    "finetune.ema_decay": None,
}  # fmt: skip


def write_study(**changes) -> None:
    Path("tiny.yaml").write_text(yaml.safe_dump(STUDY | changes))


def in_process(ran: list[str]):
    """Runs commands in this process, and lists them."""

    def execute(arguments: list[str]) -> int:
        ran.append(" ".join(arguments[: arguments.index("--config")]))
        return CliRunner().invoke(main, [*arguments, "--device", "cpu"] if arguments[0] != "prepare" else arguments).exit_code

    return execute


def run(*chosen: str) -> list[str]:
    ran: list[str] = []
    command.run(command.find("tiny.yaml", ()), chosen, False, in_process(ran))
    return ran


def test_a_study_runs_what_is_missing_and_a_second_run_does_nothing(project):
    assert run() == [
        "prepare --quick", "train-student --student none-lr0.001-seed0", "train-student --student none-lr0.01-seed0",
        "train-student --student none-lr0.001-seed1", "train-student --student none-lr0.01-seed1",
    ]  # fmt: skip
    assert run() == []
    printed = call("study", "tiny.yaml")
    assert "4 of 4 cells done" in printed and "(2 seeds)" in printed
    folder = Path("outputs/studies/tiny")
    assert {path.name for path in folder.iterdir()} == {"cells.csv", "table.csv", "table.md", "figure.png"}
    before = tree(folder)
    call("study", "tiny.yaml", "--from", str(folder / "cells.csv"))
    assert tree(folder) == before
    call("study", "tiny.yaml", "--to", "results")
    assert {path.name for path in Path("results").iterdir()} == {"tiny.csv", "tiny-table.csv", "tiny.md", "tiny.png"}
    assert sorted(tree(Path("results")).values()) == sorted(before.values())
    # another learning rate for the same level: earlier results are not its own
    write_study(axes={"lr": {"0.001": {"student.lr": 0.001}, "0.01": {"student.lr": 0.02}}})
    assert "2 of 4 cells done" in call("study", "tiny.yaml")
    # other validation images
    Path("val/cat/000.png").unlink()
    call("prepare", "--config", next(Path("outputs").glob("tiny-*/params.yaml")).as_posix())
    assert "0 of 4 cells done" in call("study", "tiny.yaml")


def test_one_cell_runs_alone_and_students_trained_before_are_shared(project):
    matrix = command.find("tiny.yaml", ())
    name = matrix.cells[-1].name
    assert run(name) == ["prepare --quick", f"train-student --student {matrix.cells[-1].variant}"]
    assert command.done_runs(matrix.cells).keys() == {name}
    states = set(Path("work/state").iterdir())
    write_study(axes={"student.lr": [0.01]}, seeds=[1], students=["slow"])  # the same settings by another name
    assert len(run()) == 2
    assert set(Path("work/state").iterdir()) == states
    assert "1 of 1 cell done" in call("study", "tiny.yaml")


def test_students_that_are_only_fine_tuned_are_run_from_weights_and_done(project):
    assert len(run(command.find("tiny.yaml", ()).cells[0].name)) == 2
    trained = next(Path("outputs").glob("*/students/*/weights.safetensors"))
    write_study(set=TUNING | {"finetune.weights": str(trained)}, axes={"finetune.lr": [0.001, 0.01]}, seeds=[0], finetune="only")
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "finetune"] * 2
    assert run() == []
    printed = call("study", "tiny.yaml")
    assert "2 of 2 cells done" in printed and "fine-tuned" not in printed


def test_metrics_that_no_cell_has_are_named(project):
    run(command.find("tiny.yaml", ()).cells[0].name)
    write_study(metrics=["top1", "val_top_1", "evaluation.parameters"])
    assert "no cell has the metric val_top_1, evaluation.parameters" in call("study", "tiny.yaml")
    write_study(metrics=["val_top_1"])
    printed = call("study", "tiny.yaml")
    assert "1 of 4 cells done" in printed and "no cell has the metric val_top_1" in printed and "nothing to show" not in printed


def test_differences_are_of_the_first_metric_that_any_cell_has(project, monkeypatch):
    write_study(metrics=["evaluation.ece", "top1"], reference={"lr": "0.01"})
    found = command.find("tiny.yaml", ())
    values = [
        Value(cell.name, cell.levels, cell.seed, "run", metric, 0.5)
        for number, cell in enumerate(found.cells) for metric in found.study.metrics[number == 0 :]
    ]  # fmt: skip
    monkeypatch.setattr(study_table, "done_runs", lambda cells: {cell.name: "run" for cell in cells})
    monkeypatch.setattr(study_table, "collect", lambda matrix, done: values)
    assert "evaluation.ece: difference from lr 0.01" in call("study", "tiny.yaml")


def test_a_student_whose_first_weights_were_replaced_is_not_done(project):
    run(command.find("tiny.yaml", ()).cells[0].name)
    source = Path("source.safetensors")
    command.find("tiny.yaml", ()).cells[0].folder.joinpath("weights.safetensors").rename(source)
    write_study(base="base.yaml", axes={}, seeds=[0], students=["none"], set={"student.weights": str(source)})
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "train-student"] and run() == []
    state = read_weights(source)
    changed = {name: value + 1 if name.startswith("head") else value for name, value in state.items()}
    save_file(changed, source)
    os.utime(source, (0, 0))  # as with cp -p
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "train-student"]


def test_a_fine_tuned_student_is_not_done_when_the_student_was_trained_anew(project):
    write_study(set=TUNING, axes={}, seeds=[0], students=["none"], finetune=True)
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "train-student", "finetune"] and run() == []
    first, tuned = (json.loads((cell.folder / "metrics.json").read_text()) for cell in command.find("tiny.yaml", ()).cells)
    assert tuned["started_from"] == first["run"]
    (command.find("tiny.yaml", ()).cells[1].folder / "metrics.json").write_text(json.dumps(tuned | {"started_from": "0" * 32}))
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "finetune"] and run() == []


def test_cells_of_other_data_settings_are_not_done(project):
    assert run() and run() == []
    write_study(set={"data.seed": 5})
    assert "was prepared from other data: data.seed: 0, 5 (prepared, configured)" in call("study", "tiny.yaml")
    assert "prepare" in [each.partition(" ")[0] for each in run()]


def test_cells_of_earlier_images_are_not_done_once_images_have_changed(project, in_tmp):
    write_study(axes={"recipe.hflip": [0.0]})
    assert run()
    next((in_tmp / "train/cat").iterdir()).unlink()
    write_study(axes={"recipe.hflip": [0.0, 0.5]}, seeds=[0])
    second = command.find("tiny.yaml", ()).cells[1]
    assert [each.partition(" ")[0] for each in run(second.name)] == ["prepare", "train-student"]
    said = call("study", "tiny.yaml")
    assert "0 of 2 cells done" in said and "differ, although their settings do not" in said
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "prepare", "prepare", "train-student"] and run() == []
    assert "2 of 2 cells done" in call("study", "tiny.yaml")


def test_cells_of_images_that_came_back_are_done_again(project, in_tmp):
    write_study(axes={"recipe.hflip": [0.0, 0.5]}, seeds=[0])
    _, second = command.find("tiny.yaml", ()).cells
    assert run()
    image = next((in_tmp / "train/cat").iterdir())
    image.rename(in_tmp / "kept")
    write_study(axes={"recipe.hflip": [0.5]}, seeds=[0])
    (second.folder / "metrics.json").unlink()
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "train-student"]
    (in_tmp / "kept").rename(image)
    write_study(axes={"recipe.hflip": [0.0, 0.5]}, seeds=[0])
    assert run() and run() == [] and "2 of 2 cells done" in call("study", "tiny.yaml")


def test_a_study_whose_images_have_changed_trains_every_cell_anew_in_one_run(project, in_tmp):
    write_study(axes={"recipe.hflip": [0.0]}, seeds=[0])
    assert run()
    next((in_tmp / "train/cat").iterdir()).unlink()
    write_study(axes={"recipe.hflip": [0.0, 0.5]}, seeds=[0])
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "train-student"] * 2 and run() == []


def test_an_axis_is_in_the_table_before_its_second_level_has_a_result(project):
    run(command.find("tiny.yaml", ()).cells[0].name)
    assert "lr" in next(line for line in call("study", "tiny.yaml").splitlines() if "top1" in line)


def test_calibration_is_a_metric_of_the_evaluation_of_the_same_run(in_tmp):
    cell = cells()[0]
    evaluation_folder(cell.config).mkdir(parents=True)
    metrics = {cell.folder.name: {"run": "this", "ece": 0.0421, "token_cosine": 0.93}}
    (evaluation_folder(cell.config) / "metrics.json").write_text(json.dumps(metrics))
    assert [study_table.read_metric(cell, "evaluation.ece", run) for run in ("this", "other")] == [0.0421, None]
    assert study_table.read_metric(cell, "evaluation.token_cosine", "this") == 0.93


def test_the_accuracy_on_a_further_set_of_the_same_name_from_elsewhere_is_not_shown(in_tmp):
    here, there = (cells(BASE.model_copy(update={"evaluate": Evaluate(sets={"v2": name})}))[0] for name in ("here", "there"))
    assert here.folder == there.folder
    evaluation_folder(here.config).mkdir(parents=True)
    evaluated = {"run": "this", "class": {"top1": 0.75, "v2_top1": 0.5}} | here.config.evaluate.sets_identity(here.config.data)
    (evaluation_folder(here.config) / "metrics.json").write_text(json.dumps({here.folder.name: evaluated}))
    found = [study_table.read_metric(cell, "evaluation.class.v2_top1", "this") for cell in (here, there)]
    assert found == [0.5, None]
    assert study_table.read_metric(there, "evaluation.class.top1", "this") == 0.75


def test_an_evaluation_on_earlier_validation_images_is_neither_shown_nor_taken_for_done(in_tmp):
    cell = cells(students=["none"])[0]
    cell.folder.mkdir(parents=True)
    evaluation_folder(cell.config).mkdir(parents=True)
    evaluated = {name: {"run": "this", "validation": "earlier", "ece": 0.1} for name in evaluated_models(cell.config)}
    (evaluation_folder(cell.config) / "metrics.json").write_text(json.dumps(evaluated))
    for images, shown in (("earlier", 0.1), ("later", None)):
        (cell.folder / "metrics.json").write_text(json.dumps({"run": "this", "validation": images}))
        assert study_table.read_metric(cell, "evaluation.ece", "this") == shown
        assert command._is_evaluated(cell.config) is (shown is not None)


def test_a_failed_command_ends_the_study_with_its_name(project):
    with pytest.raises(PipelineError, match=r"train-student --student none-lr0.001-seed0.*\n.*\n.*exit code 3"):
        command.run(command.find("tiny.yaml", ()), (), False, lambda arguments: 3 * (arguments[0] == "train-student"))


def test_commands_and_dry_runs_name_every_cell_and_run_none(project):
    printed = call("study", "tiny.yaml", "--commands")
    assert sum("train-student" in line for line in printed.splitlines()) == 4
    assert call("study", "tiny.yaml", "run", "--dry-run").count("train-student") == 4
    assert not Path("work/state").exists()
    assert load_config(printed.split()[-1]) == command.find("tiny.yaml", ()).cells[-1].config


TAUGHT = {
    "teacher": {
        "model": "deit_tiny_patch16_224", "kwargs": TINY["student"]["kwargs"] | {"img_size": 16}, "epochs": 2,
        "warmup_epochs": 0, "batch_size": 8, "precision": "float32", "workers": 0, "min_top1": 0.0, "ema_decay": None,
    },
    "teacher_logits": {"kind": "dense", "precision": "float32", "batch_groups": 1, "workers": 0},
    "student": TINY["student"] | {"epochs": 2},
    "variants": {"none": {}, "hard": {"distillation": "hard"}},
}  # fmt: skip


def test_students_of_another_teacher_under_the_same_path_are_not_done(in_tmp):
    write_teacher(seed=0)
    changes = TAUGHT | {"teacher": TAUGHT["teacher"] | {"weights": "teacher.safetensors"}}
    config, _ = make_data_set(in_tmp, {"cat": 6, "dog": 6}, {"cat": 2, "dog": 2}, **TINY | changes)
    Path("base.yaml").write_text(dump(config))
    write_study(students=["none", "hard"], axes={}, seeds=[0])
    assert len(run()) == 5
    assert run() == []
    write_teacher(seed=1)
    assert "1 of 2 cells done" in call("study", "tiny.yaml")
    assert [each.partition(" ")[0] for each in run()] == ["prepare", "teacher", "teacher-logits", "train-student"]


def write_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    model = timm.create_model(TAUGHT["teacher"]["model"], num_classes=2, **TAUGHT["teacher"]["kwargs"])
    save_weights(Path("teacher.safetensors"), model)


@pytest.mark.slow
def test_a_study_that_ends_anywhere_and_is_resumed_has_the_same_numbers(tmp_path, monkeypatch):
    tables = {}
    for name, stops in (("interrupted", (2, 5)), ("undisturbed", ())):
        root = tmp_path / name
        root.mkdir()
        monkeypatch.chdir(root)
        config, _ = make_data_set(root, {"cat": 6, "dog": 6}, {"cat": 2, "dog": 2}, **TINY | TAUGHT)
        Path("base.yaml").write_text(dump(config))
        write_study(
            students=["none", "hard"], axes={"teacher_logits.views": [4, 8]}, seeds=[0],
            metrics=["top1", "loss", "teacher.top1"], figure={"x": "views"},
        )  # fmt: skip
        matrix = command.find("tiny.yaml", ())
        for stop in stops:
            ran: list[str] = []

            def execute(arguments: list[str], ran: list[str] = ran, stop: int = stop) -> int:
                if len(ran) == stop:
                    raise KeyboardInterrupt
                return in_process(ran)(arguments)

            with pytest.raises(KeyboardInterrupt):
                command.run(matrix, (), False, execute)
        assert len(run()) < 10 if stops else len(run()) == 10
        assert run() == []
        assert "4 of 4 cells done" in call("study", "tiny.yaml")
        assert len(list(Path("work/stores").glob("*.zarr"))) == 1
        tables[name] = tree(Path("outputs/studies/tiny"))
    assert tables["interrupted"] == tables["undisturbed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "digits-quick"),
        ([], "pipeline study --list"),
        (["digits-quick", "run", "--cell", "x"], "a cell of digits-quick"),
        (["digits-quick", "--dry-run"], "the action run"),
        (["digits-quick", "run", "--to", "results"], "neither run"),
        (["digits-quick", "--from", "configs"], "a folder"),
        (["--from", "configs"], "NAME.csv"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_named(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert message in call("study", *arguments, code=2)


def test_the_shipped_studies_are_listed(monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = [line.split()[0] for line in call("study", "--list").splitlines()]
    assert sorted(listed) == sorted(path.stem for path in STUDIES)
    assert listed.index("imagenet-table2") < listed.index("imagenet-table3") < listed.index("imagenet-table10")
