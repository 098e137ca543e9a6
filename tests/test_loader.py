"""Loading: a group is the same wherever it is rendered, mixed as timm mixes, and gets its own answers."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data.mixup
import torch
import torch.utils.data._utils.pin_memory as torchs_pinning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipeline.batches.batch
from pipeline.batches.batch import Batch, Renderer, mixed, targets
from pipeline.batches.buffers import BufferPool
from pipeline.batches.loader import _StepDataset, evaluation_loader, step_loader, unit_loader
from pipeline.batches.plan import Item, Plan, Unit, all_units, unit_items
from pipeline.common.errors import PipelineError, Unreadable, UsageError, killed_worker_error
from pipeline.shards.files import ShardFiles
from pipeline.shards.index import Index
from pipeline.store.reader import Store, StoreIdentity
from pipeline.store.writer import StoreWriter
from pipeline.training import teachers as teaching
from pipeline.training.teachers import StoredTeacher, read_predictions
from pipeline.views.draw import draw_mix, draw_view
from pipeline.views.render import center_view, render

ROOT = Path(__file__).parent.parent
property_settings = settings(derandomize=True, deadline=None, max_examples=30)
# the machine may have fewer cores than two
workers_settings = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ITEMS = [Item(0, 1, 2), Item(0, 1, 3), Item(2, 0, 7), Item(1, 1, 0), Item(0, 1, 2)]


def plan_over(small_set, batch_groups=4) -> Plan:
    config, index = small_set
    return Plan(config.recipe, tuple(index.names), tuple(index.samples.tolist()), 8, batch_groups, 0, 2)


def renderer(small_set) -> Renderer:
    config, index = small_set
    return Renderer(index, config.recipe)


def values(batch: Batch) -> list:
    """Everything but the count of decodings, so that it can be compared."""
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    members = [positions.tolist() for positions in batch.members]
    return [batch.items, members, batch.checks, *(tensor.tolist() for tensor in tensors)]


def joined(parts: list[Batch]) -> list:
    return [sum(each, []) for each in zip(*map(values, parts), strict=True)]


# rendering


def test_groups_are_the_same_alone_or_among_others(small_set):
    alone = [renderer(small_set).render([item]) for item in ITEMS]
    assert values(renderer(small_set).render(ITEMS)) == joined(alone)


def test_groups_do_not_depend_on_what_was_rendered_before(small_set):
    used = renderer(small_set)
    used.render(ITEMS[::-1])
    assert values(used.render(ITEMS)) == values(renderer(small_set).render(ITEMS))


def test_each_slot_is_the_view_of_its_member(small_set):
    config, index = small_set
    batch = renderer(small_set).render(ITEMS)
    for number, item in enumerate(ITEMS):
        for slot, position in enumerate(batch.members[number]):
            image, row = index.image(item.shard, int(position)), index.rows(item.shard)[position]
            params = draw_view(config.recipe, row["key"].decode(), item.view, image.shape[1], image.shape[0])
            assert np.array_equal(batch.images[number, slot].numpy(), render(image, params, config.recipe))
            assert batch.labels[number, slot] == row["label"]


def test_mixing_is_the_drawn_one(small_set):
    config, index = small_set
    batch = renderer(small_set).render(ITEMS)
    for number, item in enumerate(ITEMS):
        members = len(batch.members[number])
        mix = draw_mix(config.recipe, index.names[item.shard], item.group, item.view, members)
        left, top, right, bottom = batch.box[number].tolist()
        assert (left, top, right - left, bottom - top) == mix.box
        assert batch.lam[number].item() == np.float32(mix.lam)
        assert batch.partner[number, :members].tolist() == mix.partner[:members].tolist()


def test_unused_slots_have_no_weight(small_set):
    batch = renderer(small_set).render(ITEMS)
    for number, members in enumerate(batch.members):
        assert batch.weights[number].tolist() == [1] * len(members) + [0] * (4 - len(members))
    assert {len(members) for members in batch.members} == {2, 3}


def test_unused_slots_repeat_the_members_as_they_are_mixed(small_set):
    batch = renderer(small_set).render(ITEMS)
    pictures, labels = mixed(batch).unflatten(0, (-1, 4)), targets(batch, 3, 0.1).unflatten(0, (-1, 4))
    for number, members in enumerate(batch.members):
        for slot in range(len(members), 4):
            member = slot - len(members)
            assert torch.equal(batch.images[number, slot], batch.images[number, member])
            assert torch.equal(pictures[number, slot], pictures[number, member])
            assert torch.equal(labels[number, slot], labels[number, member])


def test_unused_slots_do_not_shift_the_statistics_of_a_batch_norm(small_set):
    """A group that fills half of its slots gives its members what they give alone."""
    batch = renderer(small_set).render([Item(1, 1, 0)])
    assert len(batch.members[0]) == 2
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).train()
    torch.testing.assert_close(network(mixed(batch))[:2], network(mixed(batch)[:2]))


def test_repeats_of_a_group_share_a_decoding(small_set):
    batch = renderer(small_set).render([Item(0, 0, 0), Item(0, 0, 1), Item(1, 0, 0), Item(1, 0, 1)])
    assert batch.decodes == 3 + 3


def test_all_views_of_a_unit_share_a_decoding(small_set):
    config, _ = small_set
    one = renderer(small_set)
    assert one.render(unit_items(Unit(0, 1), config.recipe, 6)).decodes == 6
    assert sum(one.render([item]).decodes for item in unit_items(Unit(1, 1), config.recipe, 5)) == 5


def test_group_of_another_block_is_decoded_afresh(small_set):
    batch = renderer(small_set).render([Item(0, 0, 3), Item(0, 0, 4)])
    assert batch.decodes == 6
    assert batch.members[0].tolist() != batch.members[1].tolist()


def test_damaged_shard_stops_rendering_and_is_named(small_set, monkeypatch):
    _, index = small_set
    one = renderer(small_set)
    monkeypatch.setattr(ShardFiles, "_pread", lambda self, shard, offset, size: bytes(size))
    with pytest.raises(PipelineError, match=index.names[0]):
        one.render([ITEMS[0]])


# loaders


@workers_settings
@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_workers_changes_nothing(small_set, workers):
    a, (_, index) = plan_over(small_set), small_set
    one, other = (list(step_loader(a, index, range(5), range(1), 1, n, False)) for n in (0, workers))
    assert [values(batch) for batch in one] == [values(batch) for batch in other]


def test_loader_gives_the_steps_asked_for(small_set):
    a, (_, index) = plan_over(small_set), small_set
    loaded = [batch.items for batch in step_loader(a, index, [7, 3, 4], range(1), 1, 0, False)]
    assert loaded == [a.items(7), a.items(3), a.items(4)]


def test_slices_of_a_step_are_the_step(small_set):
    a, (_, index) = plan_over(small_set), small_set
    whole = list(step_loader(a, index, range(2), range(1), 1, 0, False))
    ranks = [list(step_loader(a, index, range(2), s, 4, 0, False)) for s in (range(0, 2), range(2, 4))]
    for step in range(2):
        slices = [batch for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
        assert values(whole[step]) == joined(slices)


@workers_settings
@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_of_the_units_is_rendered_once(small_set, workers):
    config, index = small_set
    units = all_units(3, 8, config.recipe)[2:]
    items = [i for unit in units for i in unit_items(unit, config.recipe, int(index.samples[unit.shard]))]
    loaded = [values(batch) for batch in unit_loader(units, index, config.recipe, workers, False)]
    expected = [values(renderer(small_set).render([item])) for item in items]
    assert sorted(loaded, key=str) == sorted(expected, key=str)


@workers_settings
def test_workers_decode_each_image_of_a_unit_once(small_set):
    config, index = small_set
    units = all_units(3, 4, config.recipe)
    assert sum(g.decodes for g in unit_loader(units, index, config.recipe, 2, False)) == 16


def test_loading_draws_nothing_from_the_global_generator(small_set):
    a, (_, index) = plan_over(small_set), small_set
    before = torch.get_rng_state()
    list(step_loader(a, index, range(2), range(1), 1, 0, False))
    assert torch.equal(torch.get_rng_state(), before)


@workers_settings
def test_damage_found_by_a_worker_is_a_pipeline_error_that_names_the_shard(small_set, monkeypatch):
    a, (_, index) = plan_over(small_set), small_set
    monkeypatch.setattr(ShardFiles, "_pread", lambda self, shard, offset, size: bytes(size))
    with pytest.raises(PipelineError, match=r"\.tar: sample"):
        list(step_loader(a, index, range(1), range(1), 1, 1, False))


# buffers used again

SLICES = 20  # more than any pool here has buffers


def slices(small_set, workers: int):
    """A loader of SLICES slices."""
    return step_loader(plan_over(small_set), small_set[1], range(SLICES), range(1), 1, workers, False)


@pytest.fixture(scope="module")
def pictures(small_set) -> list[torch.Tensor]:
    """Of each slice, rendered without workers."""
    return [batch.images for batch in slices(small_set, 0)]


@pytest.fixture
def acquired(monkeypatch) -> list[int | None]:
    """What the pools return, as it grows."""
    given, acquire = [], BufferPool.acquire
    monkeypatch.setattr(BufferPool, "acquire", lambda self: given.append(acquire(self)) or given[-1])
    return given


@workers_settings
@pytest.mark.parametrize("workers", [1, 2])
def test_slices_in_buffers_used_again_hold_the_same(small_set, workers):
    expected = [values(batch) for batch in slices(small_set, 0)]
    assert [values(batch) for batch in slices(small_set, workers)] == expected


@workers_settings
def test_buffers_are_used_again_when_slices_are_dropped(small_set, acquired):
    for _ in slices(small_set, 2):
        pass
    assert len(acquired) == SLICES and set(acquired) <= set(range(6))


@workers_settings
def test_slices_in_memory_of_their_own_hold_the_same_while_all_buffers_are_held(small_set, pictures, acquired):
    held = list(slices(small_set, 2))
    assert acquired.count(None) == SLICES - 6
    assert all(torch.equal(batch.images, other) for batch, other in zip(held, pictures, strict=True))


KEPT = {
    "tensor": lambda images: images,
    "view": lambda images: images[1, 2:],
    "detached": lambda images: images.detach(),
    "other_type": lambda images: images.view(torch.int32),
    "storage": lambda images: images[3].untyped_storage(),
    "array": lambda images: images.numpy(),
    "array_of_view": lambda images: images[2, 1:].numpy()[0, ::2],
    "memoryview": lambda images: memoryview(images.numpy()),
    "dlpack": np.from_dlpack,
    "saved_for_backward": lambda images: torch.ones(1, requires_grad=True) * images,
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_buffer_is_free_when_nothing_sees_its_memory_any_more(keep):
    pool = BufferPool(1, (4, 4, 3, 16, 16))
    kept = keep(pool.use(pool.acquire()))
    assert pool.acquire() is None
    del kept
    assert pool.acquire() == 0


@workers_settings
@pytest.mark.parametrize("kind", ["view", "array_of_view"])
@pytest.mark.parametrize("every", [1, 3])
def test_what_is_kept_of_a_slice_never_changes(small_set, pictures, kind, every):
    keep = KEPT[kind]
    kept = {n: keep(batch.images) for n, batch in enumerate(slices(small_set, 2)) if n % every == 0}
    assert all(np.array_equal(seen, keep(pictures[number])) for number, seen in kept.items())


def test_buffer_is_used_once_each_time_it_is_acquired():
    pool = BufferPool(1, (1,))
    buffer = pool.acquire()
    held = pool.use(buffer)
    with pytest.raises(KeyError):
        pool.use(buffer)
    del held


def test_what_a_buffer_held_is_not_seen(small_set):
    dirty = torch.full((len(ITEMS), 4, 3, 16, 16), 255, dtype=torch.uint8)
    assert values(renderer(small_set).render(ITEMS, dirty)) == values(renderer(small_set).render(ITEMS))


@workers_settings
def test_slices_after_failed_ones_hold_the_same(small_set, pictures, monkeypatch):
    render_slice = _StepDataset.__getitem__

    def failing(self, task):
        batch = render_slice(self, task)
        if task[0] < 8:
            raise PipelineError("no such slice")
        return batch

    monkeypatch.setattr(_StepDataset, "__getitem__", failing)
    loaded = iter(slices(small_set, 1))
    for _ in range(8):
        with pytest.raises(PipelineError, match="no such slice"):
            next(loaded)
    for expected, batch in zip(pictures[8:], loaded, strict=True):
        assert torch.equal(batch.images, expected)


def test_workers_that_are_spawned_render_into_the_buffers_too(small_set, pictures, acquired):
    loader = slices(small_set, 1)
    loader.multiprocessing_context = "spawn"
    for expected, batch in zip(pictures, loader, strict=True):
        assert torch.equal(batch.images, expected) and not batch.images.is_shared()
    assert None not in acquired


def test_too_little_shared_memory_is_reported_plainly(small_set, monkeypatch):
    def refuse(size: int):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", refuse)
    with pytest.raises(PipelineError, match="(?s)0.0 MiB more.*MiB free in /dev/shm.*--shm-size"):
        slices(small_set, 2)


# pinned memory


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Tensor]:
    """Copies that were made where torch pins memory, as it grows; torch believes that there is a GPU."""
    made = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: made.append(self.clone()) or made[-1])
    for name, found in {
        "is_available": True, "current_accelerator": torch.device("cuda"), "current_device_index": 0,
        "set_device_index": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.accelerator, name, lambda *_, found=found, **__: found)
    return made


def test_torchs_loader_pins_every_tensor_of_a_batch(small_set, pinned):
    batch = renderer(small_set).render(ITEMS)
    found = torchs_pinning.pin_memory(batch, "cuda")
    assert isinstance(found, Batch) and values(found) == values(batch)
    assert {id(tensor) for tensor in found.tensors().values()} == {id(tensor) for tensor in pinned}
    assert len(pinned) == 6


@workers_settings
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_pinned_slices_free_their_buffers_though_they_are_held(small_set, pictures, acquired, pinned, workers):
    held = list(step_loader(plan_over(small_set), small_set[1], range(SLICES), range(1), 1, workers, True))
    assert all(torch.equal(batch.images, other) for batch, other in zip(held, pictures, strict=True))
    copies = {id(tensor) for tensor in pinned}
    assert all(id(tensor) in copies for batch in held for tensor in batch.tensors().values())
    assert set(acquired) == (set(range(2 * workers)) if workers else {None})


# evaluation


@pytest.mark.parametrize("batch", [5, 16])
def test_evaluation_gives_every_sample_in_index_order(small_set, batch):
    _, index = small_set
    shares = range(7), range(7, len(index))
    loaded = torch.cat([part for rows in shares for part in evaluation_loader(index, rows, 12, 0.875, batch, 0, False)])
    images = [index.image(shard, i) for shard in range(3) for i in range(index.samples[shard])]
    assert np.array_equal(loaded.numpy(), [center_view(image, 12, 0.875) for image in images])


# mixing


def random_batch(mixes: list[tuple[float, tuple]], slots=6, size=16, classes=5) -> Batch:
    """Random pictures and labels whose partners are timm's; a mix is lambda and left, top, right, bottom."""
    rng, count = torch.Generator().manual_seed(len(mixes)), len(mixes)
    return Batch(
        items=[Item(0, i, 0) for i in range(count)],
        members=[np.arange(slots)] * count,
        checks=[0] * count,
        images=torch.randint(0, 256, (count, slots, 3, size, size), generator=rng, dtype=torch.uint8),
        labels=torch.randint(0, classes, (count, slots), generator=rng),
        weights=torch.ones(count, slots),
        partner=torch.arange(slots).flip(0).expand(count, slots).clone(),
        lam=torch.tensor([lam for lam, _ in mixes]),
        box=torch.tensor([box for _, box in mixes]),
    )


NO_BOX = (0, 0, 0, 0)
edges = st.integers(0, 16)
boxes = st.tuples(edges, edges, edges, edges).map(lambda e: (min(e[:2]), min(e[2:]), max(e[:2]), max(e[2:])))


def cut(box: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """CutMix with this box."""
    left, top, right, bottom = box
    return 1 - (right - left) * (bottom - top) / 256, box


mixes = st.one_of(
    st.tuples(st.floats(0, 1, width=32), st.just(NO_BOX)),
    boxes.filter(lambda box: box[2] > box[0] and box[3] > box[1]).map(cut),
)


@property_settings
@given(st.lists(mixes, min_size=1, max_size=4))
def test_pictures_are_mixed_as_timm_mixes_them(drawn):
    batch = random_batch(drawn)
    result = mixed(batch).unflatten(0, (len(drawn), 6))
    for number, (lam, (left, top, right, bottom)) in enumerate(drawn):
        theirs = timm.data.mixup.Mixup(cutmix_alpha=1.0)
        cutmix = right > left
        theirs._params_per_batch = lambda lam=lam, cutmix=cutmix: (lam, cutmix)
        pictures = batch.images[number].float()
        with pytest.MonkeyPatch.context() as patch:
            box = (top, bottom, left, right)
            patch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *_, b=box, lam=lam, **__: (b, lam))
            theirs._mix_batch(pictures)
        assert torch.allclose(result[number], pictures, rtol=1e-6, atol=1e-4)


@property_settings
@given(st.lists(mixes, min_size=1, max_size=4), st.sampled_from([0.0, 0.1, 0.3]))
def test_labels_are_mixed_and_smoothed_as_timm_does(drawn, smoothing):
    batch = random_batch(drawn)
    result = targets(batch, 5, smoothing).unflatten(0, (len(drawn), 6))
    for number, (lam, _) in enumerate(drawn):
        theirs = timm.data.mixup.mixup_target(batch.labels[number], 5, lam, smoothing)
        assert torch.allclose(result[number], theirs, rtol=1e-6, atol=1e-7)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
drawn_mixes = st.one_of(st.integers(0, 65536).map(lambda share: (share / 65536, NO_BOX)), boxes.map(cut))


@pytest.mark.parametrize("device", DEVICES)
@property_settings
@given(st.lists(drawn_mixes, min_size=1, max_size=4))
def test_mixing_rounds_nothing_so_its_bits_are_those_of_any_formula(device, drawn):
    batch = random_batch(drawn)
    result = mixed(batch.to(torch.device(device))).cpu().unflatten(0, (len(drawn), 6))
    for number, (lam, (left, top, right, bottom)) in enumerate(drawn):
        own, other = batch.images[number].long(), batch.images[number][batch.partner[number]].long()
        if right > left and bottom > top:
            expected = own.clone()
            expected[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        else:
            expected = (own * round(65536 * lam) + other * round(65536 * (1 - lam))).double() / 65536
            plain = own.float() * torch.tensor(lam) + other.float() * (1 - torch.tensor(lam))
            assert torch.equal(result[number], plain)
        assert torch.equal(result[number].double(), expected.double())


class Moved(TorchDispatchMode):
    """Counts the bytes of tensors that operations read and write; views are free."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
        return result


def test_mixing_moves_a_fraction_of_what_plain_float_formulas_do():
    batch = random_batch([(0.25, NO_BOX), (0.75, (0, 0, 8, 8))], slots=64)
    with Moved() as moved:
        mixed(batch)
    # a byte read twice and written for the partner, and read; a float written, read and written again
    assert moved.bytes <= 20 * batch.images.numel()


def test_pictures_and_labels_of_a_pair_have_the_partner_of_their_slot():
    batch = random_batch([(0.0, NO_BOX)])
    batch.partner[0] = torch.tensor([0, 5, 4, 3, 2, 1])
    assert torch.equal(mixed(batch), batch.images[0][batch.partner[0]].float())
    assert torch.equal(targets(batch, 5, 0.0).argmax(1), batch.labels[0][batch.partner[0]])


def test_group_that_is_not_mixed_keeps_its_pictures_and_labels():
    batch = random_batch([(1.0, NO_BOX)])
    assert torch.equal(mixed(batch), batch.images[0].float())
    assert torch.equal(targets(batch, 5, 0.0).argmax(1), batch.labels[0])


def part(batch: Batch, number: int) -> Batch:
    return batch._each(lambda tensor: tensor[number : number + 1])


def test_mixed_groups_are_the_same_bits_alone_or_among_others(small_set):
    batch = renderer(small_set).render(ITEMS)
    alone = [part(batch, number) for number in range(len(ITEMS))]
    assert torch.equal(mixed(batch), torch.cat([mixed(one) for one in alone]))
    assert torch.equal(targets(batch, 3, 0.1), torch.cat([targets(one, 3, 0.1) for one in alone]))


def test_what_stands_in_unused_slots_does_not_reach_the_members(small_set):
    batch = renderer(small_set).render(ITEMS)
    used = batch.weights.flatten() > 0
    before = mixed(batch)[used], targets(batch, 3, 0.1)[used]
    batch.images[batch.weights == 0] = 255
    batch.labels[batch.weights == 0] = 2
    assert torch.equal(mixed(batch)[used], before[0])
    assert torch.equal(targets(batch, 3, 0.1)[used], before[1])


# answers


def answer(shard: int, row: int, view: int) -> int:
    """What the toy teacher says."""
    return (shard + row * row + 2 * row + view) % 3


@pytest.fixture(scope="module")
def store(small_set, tmp_path_factory) -> Store:
    """A complete store of the toy teacher's answers about the small set."""
    config, index = small_set
    path = str(tmp_path_factory.mktemp("store") / "s.zarr")
    made = StoreWriter.create(path, StoreIdentity(index.fingerprint, config.recipe, {}), index, 8, "dense", 1, "float32")
    one = Renderer(index, config.recipe)
    for unit in all_units(3, 8, config.recipe):
        samples = int(index.samples[unit.shard])
        items = unit_items(unit, config.recipe, samples)
        checks = np.array(one.render(items).checks, np.uint64).reshape(-1, 4).T
        views = range(4 * unit.block, 4 * unit.block + 4)
        answers = [[answer(unit.shard, row, view) for row in range(samples)] for view in views]
        argmax = np.array(answers, np.uint16)
        made.write_unit(unit, {"argmax": argmax, "dense": np.eye(3, dtype=np.float16)[argmax]}, checks)
    return Store.open(path, index, config.recipe)


def test_each_slot_gets_the_answer_about_its_member(small_set, store):
    batch = renderer(small_set).render(ITEMS)
    argmax, payload = read_predictions(store, batch, "dense")
    assert argmax.dtype == torch.int64 and payload.shape == (20, 3)
    for number, item in enumerate(ITEMS):
        answers = [answer(item.shard, row, item.view) for row in batch.members[number].tolist()]
        own = slice(4 * number, 4 * number + len(answers))
        assert argmax[own].tolist() == answers == payload[own].argmax(1).tolist()


def test_unused_slots_get_class_0(small_set, store):
    batch = renderer(small_set).render(ITEMS)
    argmax, payload = read_predictions(store, batch, "dense")
    unused = batch.weights.flatten() == 0
    assert unused.any() and not argmax[unused].any() and not payload[unused].any()


def test_answers_go_to_the_device_as_they_are_stored_and_are_decoded_there(small_set, store, monkeypatch):
    sent = []
    monkeypatch.setattr(teaching, "send", lambda tensor, device: sent.append(tensor) or tensor.to(device))
    elsewhere = torch.device("meta")
    answer = StoredTeacher(store, "dense")(renderer(small_set).render(ITEMS), torch.zeros(20, device=elsewhere))
    assert {(tensor.dtype, tensor.shape) for tensor in sent} == {(torch.float16, (20, 3)), (torch.int64, (20,))}
    assert answer.logits.dtype == torch.float32 and answer.logits.device == answer.argmax.device == elsewhere


@pytest.mark.parametrize("kind", ["argmax", "dense"])
def test_reused_predictions_are_those_of_one_view_for_the_pictures_of_every_view(kind, small_set, store):
    batch = renderer(small_set).render(ITEMS)
    argmax, payload = read_predictions(store, batch, kind, reuse_view=6)
    assert 6 not in {item.view for item in ITEMS} and len({item.view // 4 for item in ITEMS}) == 2
    for number, item in enumerate(ITEMS):
        answers = [answer(item.shard, row, 6) for row in batch.members[number].tolist()]
        own = slice(4 * number, 4 * number + len(answers))
        assert argmax[own].tolist() == answers
        assert payload is None or payload[own].argmax(1).tolist() == answers
    again = renderer(small_set).render(ITEMS)
    assert torch.equal(batch.images, again.images) and batch.checks == again.checks


def test_a_group_that_is_not_the_one_the_teacher_saw_is_refused_with_reused_predictions_too(small_set, store, monkeypatch):
    monkeypatch.setattr(pipeline.batches.batch, "render", changed_pixel)
    with pytest.raises(PipelineError, match="a different order, lambda, partner or pixel"):
        read_predictions(store, renderer(small_set).render([Item(2, 1, 5)]), "argmax", reuse_view=0)


def test_argmax_alone_has_no_payload(small_set, store):
    assert read_predictions(store, renderer(small_set).render(ITEMS), "argmax")[1] is None


def test_every_group_that_is_trained_on_is_the_one_the_teacher_saw(small_set, store):
    a, (_, index) = plan_over(small_set), small_set
    steps = range(2 * 8 * a.groups // a.batch_groups)  # views come round once
    for batch in step_loader(a, index, steps, range(1), 1, 0, False):
        read_predictions(store, batch, "argmax")


def changed_mix(**changes):
    def draw(*arguments):
        mix = draw_mix(*arguments)
        return dataclasses.replace(mix, **{name: change(mix) for name, change in changes.items()})

    return draw


def changed_pixel(image, params, recipe, out):
    render(image, params, recipe, out)[1, 3, 5] ^= 1


GROUP_MEMBERS = pipeline.batches.batch.group_members


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("draw_mix", changed_mix(lam=lambda mix: mix.lam + 1 / 65536)),
        ("draw_mix", changed_mix(partner=lambda mix: np.roll(mix.partner, 1))),
        ("draw_mix", changed_mix(box=lambda mix: (mix.box[0], mix.box[1], mix.box[2], mix.box[3] + 1))),
        ("draw_mix", changed_mix(method=lambda mix: {"mixup": "cutmix", "cutmix": "mixup"}[mix.method])),
        ("render", changed_pixel),
        ("group_members", lambda *arguments: GROUP_MEMBERS(*arguments)[::-1]),
        ("draw_view", lambda recipe, key, view, w, h: draw_view(recipe, key, view + 1, w, h)),
    ],
    ids=["lambda", "partner", "box", "method", "pixel", "order", "view"],
)
def test_group_that_is_not_the_one_the_teacher_saw_is_refused(name, changed, small_set, store, monkeypatch):
    monkeypatch.setattr(pipeline.batches.batch, name, changed)
    batch = renderer(small_set).render([Item(2, 1, 5)])
    with pytest.raises(PipelineError) as caught:
        read_predictions(store, batch, "argmax")
    message = str(caught.value)
    assert "group 1 of shard 000002.tar, view 5" in message
    assert "a different order, lambda, partner or pixel" in message


def test_answers_of_another_unit_are_refused(small_set, store, monkeypatch):
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, shard, view, kind: read(self, shard, view ^ 4, kind))
    with pytest.raises(PipelineError, match="group 1 of shard 000000.tar, view 2"):
        read_predictions(store, renderer(small_set).render(ITEMS), "argmax")


def test_message_about_another_group_names_the_versions_that_wrote_the_store(small_set, store, monkeypatch):
    monkeypatch.setattr(pipeline.batches.batch, "render", changed_pixel)
    with pytest.raises(PipelineError, match=f"numpy {np.__version__}"):
        read_predictions(store, renderer(small_set).render(ITEMS), "argmax")


def test_a_worker_starts_after_this_process_has_rendered_large_pictures():
    code = (
        "import numpy as np, cv2, torch\n"
        "from pipeline.batches.loader import _loader\n"
        "from pipeline.views.ops import apply_op\n"
        "cv2.resize(apply_op(np.zeros((900, 900, 3), np.uint8), 'Rotate', 30.0, (1, 2, 3)), (2000, 2000))\n"
        "assert list(_loader([1, 2], 1, False)) == [1, 2]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("kind", [PipelineError, Unreadable, UsageError])
def test_a_loader_workers_own_error_is_raised_with_its_message_alone(small_set, monkeypatch, kind):
    def refuse(*_):
        try:
            raise PipelineError("the cause")
        except PipelineError as cause:
            raise kind("a.tar: broken", expected="1 byte", found="2", do="repair it") from cause

    _, index = small_set
    monkeypatch.setattr(Index, "image", refuse)
    with pytest.raises(kind) as caught:
        list(evaluation_loader(index, range(4), 16, 1.0, 2, 1, False))
    assert type(caught.value) is kind
    assert str(caught.value) == str(kind("a.tar: broken", expected="1 byte", found="2", do="repair it"))


def test_killed_worker_of_a_loader_is_reported_as_such(small_set, monkeypatch):
    _, index = small_set
    monkeypatch.setattr(Index, "image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError) as caught:
        list(evaluation_loader(index, range(4), 16, 1.0, 2, 1, False))
    assert "out of memory" in str(killed_worker_error(caught.value))


def test_other_errors_are_not_taken_for_a_killed_worker():
    assert killed_worker_error(RuntimeError("CUDA out of memory")) is None
    assert killed_worker_error(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")) is None
