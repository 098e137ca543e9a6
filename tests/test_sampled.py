"""Kind sampled: classes drawn from the teacher's softmax, without bias, the same everywhere, and never mistaken."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store_commands import call
from test_training import CPU, loaded, trained_losses

import pipeline
from pipeline.batches.batch import Renderer
from pipeline.batches.plan import Item
from pipeline.cli.find_store import find_store
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.params import dump
from pipeline.config.schema import Config, Recipe, Student
from pipeline.config.store_spec import sampling_identity, store_spec
from pipeline.report.examples import training_examples
from pipeline.store.labelling import recompute
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.sampling import Sampler, class_weights, draw_classes
from pipeline.training.losses import distillation_losses, sampled_loss, soft_loss
from pipeline.training.run import TeacherOutput
from pipeline.training.teachers import OnlineTeacher, create_teacher
from pipeline.views.draw import draw_offset
from stages import teacher_logits, train_student

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.5, -3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 5.0, -40.0, 8.5]])
OFFSETS = [0.3604455395201528, 0.21809971935997285]
WEIGHTS = [[274877906944, 19099465639, 72457029601, 22164, 232679124804]]
DRAWN = [[0, 0, 2, 3], [0, 1, 2, 4], [0, 0, 2, 4]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
COUNTS = pytest.mark.parametrize("samples", [1, 2, 4, 7])


def random_offsets(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def even_offsets(count: int) -> torch.Tensor:
    """Means over these are expectations, up to 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def shares(logits: torch.Tensor, offsets: torch.Tensor, samples: int, tau: float = 1.0) -> torch.Tensor:
    """t = counts / k, (offsets, classes), of one row of logits."""
    drawn = draw_classes(logits.expand(len(offsets), -1), offsets, samples, tau)
    assert drawn.shape == (len(offsets), samples)
    return torch.nn.functional.one_hot(drawn, len(logits)).sum(1).double() / samples


# what is drawn


@COUNTS
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_the_mean_of_many_draws_is_the_softmax_within_four_standard_errors(samples, tau):
    for row, logits in enumerate(LOGITS):
        drawn, expected = shares(logits, random_offsets(20_000, row), samples, tau), (logits.double() / tau).softmax(0)
        part = (samples * expected) % 1
        errors = (part * (1 - part)).sqrt() / samples / 20_000**0.5
        assert ((drawn.mean(0) - expected).abs() <= 4 * errors + 1e-4).all()


@COUNTS
def test_draws_vary_no_more_than_independent_ones(samples):
    for row, logits in enumerate(LOGITS):
        expected = logits.double().softmax(0)
        systematic = shares(logits, even_offsets(20_000), samples).var(0, correction=0).sum()
        alone = shares(logits, random_offsets(20_000 * samples, row), 1)
        independent = alone.unflatten(0, (-1, samples)).mean(1).var(0).sum()
        formula = (1 - expected.square().sum()) / samples
        assert independent == pytest.approx(float(formula), rel=0.05)
        part = (samples * expected) % 1
        assert systematic == pytest.approx(float((part * (1 - part)).sum()) / samples**2, abs=1e-3)
        assert systematic <= formula + 1e-3


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 255), st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([0.0, 1.0, 5.0, 2e4]),
    st.integers(0, 999),
)  # fmt: skip
def test_each_class_is_drawn_k_p_times_rounded_up_or_down(classes, samples, tau, spread, seed):
    logits = spread * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed))
    drawn = draw_classes(logits, random_offsets(4, seed), samples, tau)
    assert (drawn.diff(dim=1) >= 0).all()
    counts = torch.nn.functional.one_hot(drawn, classes).sum(1)
    expected = samples * (logits.double() / tau).softmax(1)
    assert (counts.sum(1) == samples).all()
    assert ((counts - expected).abs() < 1 + 1e-6).all()


@pytest.mark.parametrize("offset", [2.0**-53, 0.5, 1 - 2.0**-53])
def test_a_certain_class_is_the_only_one_and_an_impossible_one_is_never_drawn(offset):
    offsets = torch.tensor([offset], dtype=torch.float64)
    assert draw_classes(torch.tensor([[0.0, 900.0, 0.0]]), offsets, 5, 1.0).tolist() == [[1] * 5]
    assert set(draw_classes(torch.tensor([[0.0, 0.0, -900.0]]), offsets, 5, 1.0).flatten().tolist()) <= {0, 1}
    assert draw_classes(torch.zeros(1, 1), offsets, 3, 1.0).tolist() == [[0, 0, 0]]
    assert draw_classes(torch.zeros(1, 2), offsets, 2, 1.0).tolist() == [[0, 1]]


def test_the_largest_numbers_of_classes_and_draws_do_not_overflow():
    drawn = draw_classes(torch.zeros(1, 65_535), even_offsets(1), 255, 1.0)
    assert drawn[0, 0] >= 0 and drawn[0, -1] > 65_000 and (drawn.diff() > 200).all()


def test_weights_are_the_softmax():
    logits = 5 * torch.randn(8, 100, generator=torch.Generator().manual_seed(1))
    for tau in (0.5, 1.0, 4.0):
        weights = class_weights(logits, tau)
        found = weights.double() / weights.sum(1, keepdim=True)
        assert (found - (logits.double() / tau).softmax(1)).abs().max() < 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_drawn_is_the_same_on_every_machine(device):
    """If one of these values changes, SAMPLING_VERSION must, too."""
    recipe = Recipe(seed=3)
    assert [draw_offset(recipe, "cat/1", view) for view in (0, 1)] == OFFSETS
    assert draw_offset(recipe, "cat/2", 0) != OFFSETS[0] != draw_offset(Recipe(seed=4), "cat/1", 0)
    assert class_weights(LOGITS[2:].to(device), 3.0).tolist() == WEIGHTS
    offsets = torch.tensor([*OFFSETS, 0.25], dtype=torch.float64)
    assert draw_classes(LOGITS.to(device), offsets.to(device), 4, 3.0).tolist() == DRAWN
    logits = 4 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(5))
    weights = [class_weights(values, 2.0).cpu() for values in (logits, logits.to(device))]
    assert torch.equal(*weights)
    # exp in Python's own arithmetic, of which the last bit may differ
    row = [math.exp((value - max(logits[0].tolist())) / 2) for value in logits[0].tolist()]
    assert max(abs(weights[0][0].double() / 2**38 - torch.tensor(row, dtype=torch.float64))) < 1e-11


def test_a_row_does_not_depend_on_the_rows_around_it():
    logits, offsets = torch.randn(9, 50, generator=torch.Generator().manual_seed(2)), random_offsets(9)
    alone = [draw_classes(logits[n : n + 1], offsets[n : n + 1], 4, 2.0) for n in range(9)]
    assert torch.equal(torch.cat(alone), draw_classes(logits, offsets, 4, 2.0))


# the loss


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("tau", "reduction"), [(1.0, "numel"), (3.0, "batchmean")])
def test_the_expected_gradient_is_that_of_the_complete_soft_loss(samples, tau, reduction):
    count, teacher = 20_000, LOGITS[:1]
    drawn = draw_classes(teacher.expand(count, -1), even_offsets(count), samples, tau)
    student = torch.tensor([[0.3, 1.0, -2.0, 0.0, 0.7]], requires_grad=True)
    exact = soft_loss(student, teacher, torch.ones(1), tau, reduction)
    mean = sampled_loss(student.expand(count, -1), drawn, torch.full((count,), 1 / count), tau, reduction)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (exact, mean)]
    assert gradients[0].norm() > 0.05
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-3)
    probabilities = (teacher / tau).softmax(1)
    entropy = -(probabilities * probabilities.log()).sum() * tau * tau / (5 if reduction == "numel" else 1)
    assert float((mean - exact).detach()) == pytest.approx(float(entropy), abs=1e-3)


def test_a_class_drawn_twice_counts_twice_and_a_slot_of_weight_0_not_at_all():
    logits, weights = LOGITS[:2], torch.tensor([1.0, 0.0])
    found = sampled_loss(logits, torch.tensor([[0, 0, 3, 1], [4, 4, 4, 4]]), weights, 2.0, "batchmean")
    log_student = (logits[0] / 2).log_softmax(0)
    shares = torch.tensor([0.5, 0.25, 0.0, 0.25, 0.0])
    assert float(found) == pytest.approx(float(-4 * (shares * log_student).sum()), rel=1e-5)


def test_a_soft_student_learns_from_the_drawn_classes():
    student = Student(distillation="soft", tau=2.0, alpha=1.0)
    samples, ones = torch.tensor([[0, 2], [1, 1], [0, 4]]), torch.ones(3)
    output = TeacherOutput(LOGITS.argmax(1), None, samples)
    found = distillation_losses(LOGITS, LOGITS, torch.eye(5)[:3], ones, output, student)[0]
    assert found == sampled_loss(LOGITS, samples, ones, 2.0, student.soft_reduction)


# the store


SAMPLED = "teacher_logits.kind=sampled", "teacher_logits.sample_tau=3.0"


def sampled(*more: str) -> Config:
    return loaded(*SAMPLED, *more)


@pytest.fixture(scope="module")
def template(taught_template, tmp_path_factory) -> Path:
    """A folder with a complete store of drawn classes next to the dense one."""
    root = Path(shutil.copytree(taught_template, tmp_path_factory.mktemp("sampled") / "sampled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = sampled()
        teacher_logits.run(config, CPU)
        Path("params.yaml").write_text(dump(config))
    return root


@pytest.fixture
def config(template, tmp_path, monkeypatch) -> Config:
    """The configuration of a copy of it."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "sampled"))
    return loaded()


def the_store(config: Config) -> Store:
    return find_store(config, store_spec(config, "train-student"))


def test_soft_distillation_from_drawn_classes_offline_equals_online_to_the_bit(config):
    offline = trained_losses(config, "soft", "stored")
    assert len(offline) >= 20
    assert offline == trained_losses(config, "soft", "online")


def test_the_stored_classes_are_those_drawn_for_the_sample_and_view(config):
    store, dense = the_store(config), loaded("teacher_logits.kind=dense")
    (path,) = [path for path in Path("work/stores").glob("*.zarr") if path.name != Path(store.path).name]
    logits = Store.open(str(path), store.index, dense.recipe).read(1, 5, "dense").payload
    keys = store.index.rows(1)["key"]
    offsets = torch.tensor([draw_offset(config.recipe, key.decode(), 5) for key in keys], dtype=torch.float64)
    # float16 rounds the logits, and so a point rarely falls into another class
    expected = draw_classes(torch.from_numpy(logits.astype("float32")), offsets, 4, 3.0)
    found = torch.from_numpy(store.read(1, 5, "sampled").payload.astype(int))
    assert found.shape == expected.shape and (found != expected).sum() <= 1


def test_other_draws_are_another_store_and_other_kinds_keep_theirs(config):
    before = {path: tree(path) for path in Path("work/stores").glob("*.zarr")}
    teacher_logits.run(loaded("teacher_logits.samples=2"), CPU)
    stores = {path: tree(path) for path in Path("work/stores").glob("*.zarr")}
    assert len(stores) == len(before) + 1 and all(stores[path] == before[path] for path in before)
    identity = StoreIdentity("i", Recipe(), {})
    assert identity.as_dict().keys() == {"index", "recipe", "teacher"}
    draws = [sampling_identity(sampled(f"teacher_logits.{change}", "students=[hard]").teacher_logits)
             for change in ("samples=4", "samples=2", "sample_tau=1.0")]  # fmt: skip
    assert len({StoreIdentity("i", Recipe(), {}, each).fingerprint for each in (None, *draws)}) == 4
    assert sampling_identity(loaded("teacher_logits.kind=dense", "teacher_logits.samples=9").teacher_logits) is None


@pytest.mark.parametrize("change", [("samples=2",), ("sample_tau=1.0", "student.tau=1.0")])
def test_a_store_of_other_draws_is_refused_until_teacher_logits_has_run_again(config, change):
    first, *rest = change
    other = loaded(f"teacher_logits.{first}", *rest, "variants.soft.tau=1.0" if rest else "variants.soft.tau=3.0")
    with pytest.raises(UsageError, match=r"(?s)the drawn classes.*run teacher-logits again"):
        train_student.run(other, CPU, "soft")
    with pytest.raises(UsageError, match="the drawn classes"):
        the_store(other)
    path = str(next(path for path in Path("work/stores").glob("*.zarr") if (path / "dense").exists()))
    with pytest.raises(UsageError, match="a store of other kinds"):
        find_store(config, store_spec(config, "train-student"), path)


def test_another_temperature_than_the_students_is_refused(config):
    with pytest.raises(UsageError, match=r"(?s)sample_tau must be the tau.*student soft has tau 3"):
        loaded("teacher_logits.sample_tau=1.0")
    other = config.student_named("soft").model_copy(update={"tau": 2.0})
    for how in ("stored", "online"):
        with pytest.raises(UsageError, match=r"(?s)the student's tau.*sample_tau, 3.*found: +2"):
            train_student.run(config, CPU, "soft", student=other, teacher=how)
    train_student.run(config, CPU, "hard", student=other.model_copy(update={"distillation": "hard"}))


def test_online_draws_are_in_the_runs_identity_and_only_for_soft_students(config):
    index = the_store(config).index

    def identity(config: Config, name: str):
        return create_teacher(config, config.student_named(name), "train-student", index, CPU, "online")[1]

    assert identity(config, "soft")["sampling"] == {"samples": 4, "tau": 3.0, "version": 1}
    assert identity(loaded("teacher_logits.samples=2"), "soft") != identity(config, "soft")
    plain = loaded("teacher_logits.kind=dense")
    assert identity(config, "hard") == identity(plain, "hard") == identity(plain, "soft")
    assert identity(plain, "soft").keys() == {"online", "precision"}


def test_logits_that_are_not_finite_are_refused_online(config):
    store = the_store(config)
    batch = Renderer(store.index, config.recipe).render([Item(0, 0, 0)])
    teacher = type("NotFinite", (), {"logits": lambda self, pictures, slots: torch.full((len(pictures), 3), torch.nan)})
    online = OnlineTeacher(teacher(), Sampler(store.index, config.recipe, 2, 1.0))
    with pytest.raises(PipelineError, match="NaN or infinity"):
        online(batch, torch.zeros(batch.labels.numel(), 3, 16, 16))


def test_verifying_computes_the_same_classes_again(config):
    store = the_store(config)
    unit = store.units(8)[0]
    ((_, difference),) = recompute(config, store_spec(config, "train-student"), store, [unit], CPU)
    assert difference.draws == difference.flips == difference.checks == 0 and difference.largest is None
    assert "the drawn classes of 0" in str(difference)


def test_the_open_batches_hold_the_drawn_classes_in_place_of_logits(config):
    batches = pipeline.open_batches(config, "soft", workers=0)
    batch = next(batches.steps())
    assert batch.logits is None and batch.drawn.shape == (8, 4) and batch.drawn.max() < 3
    alone = batch.without_padding()
    assert torch.equal(alone.drawn, batch.drawn[batch.weights > 0])
    assert next(pipeline.open_batches(config, "hard", workers=0).steps()).drawn is None
    with pytest.raises(UsageError, match=r"(?s)topk, dense8 or dense\n.*found: +sampled.*without logits=True"):
        pipeline.open_batches(config, "soft", logits=True, workers=0)


def test_examples_of_a_store_of_drawn_classes_show_no_probability(config):
    store = the_store(config)
    shown = training_examples(config, store.index, store, {"kind": "sampled", "views": 8})
    assert all(view.prediction and view.probability is None for example in shown for view in example.views)


def test_dry_runs_status_and_prune_know_the_store(config):
    assert "drawn: 4 classes per view, at temperature 3" in call("teacher-logits", "--dry-run", "--device", "cpu")
    assert "complete: 8 views as sampled" in call("store", "info")
    name = Path(the_store(config).path).name
    for folder in Path("outputs").glob("*"):  # nothing there names the store any more
        shutil.rmtree(folder / "teacher-logits")
        (folder / "params.yaml").unlink(missing_ok=True)
    assert name not in call("prune")
    Path("params.yaml").write_text(dump(loaded("teacher_logits.samples=2")))
    assert name in call("prune")


def test_a_published_store_of_drawn_classes_is_refused_for_others(config, tmp_path):
    call("store", "publish", str(tmp_path / "published"))
    published = json.loads((tmp_path / "published" / "manifest.json").read_text())
    assert published["sampling"] == {"samples": 4, "tau": 3.0, "version": 1}
    card = (tmp_path / "published" / "README.md").read_text()
    assert "4 per view, at temperature 3" in card and "sample_tau: 3.0" in card
    shutil.rmtree("work/stores")
    Path("params.yaml").write_text(dump(loaded("teacher_logits.samples=2")))
    said = call("store", "fetch", str(tmp_path / "published"), code=2)
    assert "its drawn classes" in said and '"samples": 4' in said and '"samples": 2' in said
    Path("params.yaml").write_text(dump(loaded("teacher_logits.kind=argmax", "students=[hard]")))
    call("store", "fetch", str(tmp_path / "published"))
    assert "every checksum as recorded" in call("store", "verify")
