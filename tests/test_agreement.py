"""The teacher's agreement and confidence per view, compared with a count of one view of one image at a time."""

import csv
import dataclasses
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_store_commands import call, the_store
from test_training import CPU, loaded

from pipeline.batches.batch import Renderer
from pipeline.batches.plan import unit_items
from pipeline.cli.find_store import find_store
from pipeline.common.errors import PipelineError
from pipeline.config.store_spec import store_spec
from pipeline.models.teacher import TeacherForward
from pipeline.report.agreement import describe_agreement, write_agreement
from pipeline.store.agreement import QUANTITIES, Mean, measure_agreement, most_frequent
from pipeline.store.kinds import NO_CLASS
from stages import teacher_logits

property_settings = settings(derandomize=True, deadline=None, max_examples=60)


@property_settings
@given(
    hnp.arrays(
        np.uint16, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.sampled_from([0, 1, 2, 65534, NO_CLASS])
    )
)
def test_the_most_frequent_class_is_as_counted(classes):
    for column, found in zip(classes.T.tolist(), most_frequent(classes).tolist(), strict=True):
        counts = Counter(number for number in column if number != NO_CLASS)
        expected = min((-count, number) for number, count in counts.items())[1] if counts else NO_CLASS
        assert found == expected


def found_one_by_one(store, spec) -> dict[str, dict[int, list[float]]]:
    """The value of each quantity for every (image, view) that counts, by view."""
    renderer, values = Renderer(store.index, spec.recipe), defaultdict(lambda: defaultdict(list))
    dominated, own_classes = [], defaultdict(Counter)
    for unit in store.units(spec.views):
        for item in unit_items(unit, spec.recipe, int(store.index.samples[unit.shard])):
            batch, stored = renderer.render([item]), store.read(item.shard, item.view, "dense")
            for slot, position in enumerate(batch.members[0].tolist()):
                partner, lam = int(batch.partner[0, slot]), float(batch.lam[0])
                label = int(batch.labels[0, partner if lam < 0.5 else slot])
                unmixed = partner == slot or lam == 1
                predicted = int(stored.argmax[position])
                logits = stored.payload[position].astype(np.float64)
                confidence = np.exp(logits[predicted]) / np.exp(logits).sum()
                values["label"][item.view].append(predicted == label)
                values["confidence"][item.view].append(confidence)
                if unmixed:
                    values["label, not mixed"][item.view].append(predicted == label)
                    values["confidence, not mixed"][item.view].append(confidence)
                if lam >= 0.5 or partner == slot:
                    own_classes[item.shard, position][predicted] += 1
                    dominated.append((item.shard, position, item.view, predicted))
    for shard, position, view, predicted in dominated:
        counts = own_classes[shard, position]
        values["most frequent"][view].append(predicted == min(counts, key=lambda number: (-counts[number], number)))
    return values


def opened():
    config = loaded()
    spec = store_spec(config, "train-student")
    return find_store(config, spec), spec


@pytest.fixture
def varied(taught, monkeypatch):
    """The store of a teacher with different predictions: the tiny one predicts nearly the same class everywhere."""
    plain = TeacherForward.logits
    monkeypatch.setattr(TeacherForward, "logits", lambda *a: 40 * (plain(*a) - plain(*a).mean(0)))
    shutil.rmtree(the_store())
    teacher_logits.run(taught, CPU)
    return opened()


def test_every_quantity_is_as_counted_one_by_one(varied):
    store, spec = varied
    found, expected = measure_agreement(store, spec), found_one_by_one(store, spec)
    assert list(found) == list(QUANTITIES) and set(expected) == set(QUANTITIES)
    for name, mean in found.items():
        assert mean.counts.tolist() == [len(expected[name][view]) for view in range(spec.views)], name
        for view, value in enumerate(mean.per_view):
            if mean.counts[view]:
                assert value == pytest.approx(np.mean(expected[name][view]), abs=1e-5), (name, view)
        assert mean.overall == pytest.approx(
            np.mean([each for view in expected[name].values() for each in view]), abs=1e-5
        )
    assert 0 < found["label"].overall < 1 and 0 < found["most frequent"].overall < 1
    assert found["label, not mixed"].counts.sum() not in (0, found["label"].counts.sum())


def test_unlabelled_images_do_not_count_for_the_label(taught):
    store, spec = opened()
    before = measure_agreement(store, spec)
    store.index.rows(0)["label"][:] = -1
    after = measure_agreement(store, spec)
    assert (before["label"].counts - after["label"].counts == store.index.samples[0]).all()
    assert after["confidence"].counts.tolist() == before["confidence"].counts.tolist()


def test_a_store_of_classes_alone_has_no_confidence(taught):
    store, spec = opened()
    alone, every = (measure_agreement(store, dataclasses.replace(spec, kind=kind)) for kind in ("argmax", "dense"))
    assert list(alone) == ["label", "label, not mixed", "most frequent"]
    assert all((alone[name].sums == every[name].sums).all() for name in alone)


def test_an_incomplete_store_is_refused(taught):
    next(path for path in (the_store() / "argmax/c/1").iterdir()).unlink()
    with pytest.raises(PipelineError, match="1 unit missing"):
        measure_agreement(*opened())


def test_store_info_writes_a_table_and_a_picture_on_demand(taught):
    assert "most frequent" not in call("store", "info")
    said = call("store", "info", "--views", "seen")
    assert "most frequent" in said and "complete: 8 views" in said
    first = tree(Path("seen"))
    assert set(first) == {"agreement.csv", "agreement.png"}
    call("store", "info", "--views", "seen")
    assert tree(Path("seen")) == first
    with open("seen/agreement.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["quantity"], int(row["view"])) for row in rows] == [(q, v) for q in QUANTITIES for v in range(8)]
    assert all(1 / 3 <= float(row["mean"]) <= 1 for row in rows if row["quantity"] == "confidence")


def test_what_never_counts_is_none_and_draws_no_line(tmp_path):
    nothing = Mean(np.zeros(2, np.int64), np.zeros(2))
    agreement = {"label": Mean(np.array([4, 4]), np.array([1.0, 3.0])), "label, not mixed": nothing}
    first, second = describe_agreement(agreement).splitlines()[1:]
    assert "50.00 %" in first and "none" in second
    write_agreement(tmp_path, agreement)
    assert (tmp_path / "agreement.csv").read_text().splitlines()[1:] == [
        "label,0,4,0.25", "label,1,4,0.75", '"label, not mixed",0,0,', '"label, not mixed",1,0,',
    ]  # fmt: skip
