"""Render batches of groups, mix them, build their targets and checksums.

A group always has `group_size` slots, so shapes never change. Unused slots repeat the members with weight 0: a network
that computes statistics over its batch, as batch norm does in training, then sees nothing but samples.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.batches.buffers import empty_images
from pipeline.batches.plan import Item, group_members
from pipeline.config.schema import Recipe
from pipeline.shards.index import Index
from pipeline.shards.index_file import UNLABELLED
from pipeline.views.draw import Mix, draw_mix, draw_view
from pipeline.views.render import render


@dataclass
class Batch:
    """Groups, each in one view: G groups of S slots, P x P pixels."""

    items: list[Item]
    members: list[np.ndarray]
    """Positions in the shard, int64, in slot order."""
    checks: list[int]
    """`group_check` of each group."""
    images: torch.Tensor
    """uint8 (G, S, 3, P, P): views before mixing."""
    labels: torch.Tensor
    """int64 (G, S)"""
    weights: torch.Tensor
    """float32 (G, S): 1 for a sample, 0 for an unused slot, which repeats a member."""
    partner: torch.Tensor
    """int64 (G, S)"""
    lam: torch.Tensor
    """float32 (G,)"""
    box: torch.Tensor
    """int64 (G, 4): left, top, right, bottom; empty unless cutmix."""
    decodes: int = 0
    """Images decoded for these views."""

    @property
    def views(self) -> int:
        """Number of views of samples, without unused slots."""
        return sum(len(members) for members in self.members)

    def tensors(self) -> dict[str, torch.Tensor]:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, torch.Tensor)}

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return dataclasses.replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory; torch's DataLoader calls the method by this name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))


class Renderer:
    """Renders items; caches the last group's decoded images for its other views."""

    def __init__(self, index: Index, recipe: Recipe):
        self.index, self.recipe = index, recipe
        self.names = tuple(index.names)
        self.samples = tuple(int(samples) for samples in index.samples)
        self._decoded: tuple[tuple, list[np.ndarray]] = ((), [])

    def __getstate__(self):
        return self.__dict__ | {"_decoded": ((), [])}

    def members(self, item: Item) -> np.ndarray:
        return group_members(self.recipe, self.names, self.samples, item)

    def render(self, items: list[Item], images: torch.Tensor | None = None) -> Batch:
        """Render the items into `images`, which is overwritten; without it, into new memory.

        Raises:
            PipelineError: a shard or the index is damaged.
        """
        recipe, count, slots = self.recipe, len(items), self.recipe.group_size
        if images is None:
            images = empty_images(count, slots, 3, recipe.size, recipe.size)
        batch = Batch(
            items=items,
            members=[self.members(item) for item in items],
            checks=[],
            images=images,
            labels=torch.zeros(count, slots, dtype=torch.int64),
            weights=torch.zeros(count, slots),
            partner=torch.zeros(count, slots, dtype=torch.int64),
            lam=torch.ones(count),
            box=torch.zeros(count, 4, dtype=torch.int64),
        )
        for number, (item, members) in enumerate(zip(items, batch.members, strict=True)):
            self._render_one(batch, number, item, members)
        return batch

    def _render_one(self, batch: Batch, number: int, item: Item, members: np.ndarray) -> None:
        decoded, fresh = self._decode(item, members)
        batch.decodes += fresh
        rows = self.index.rows(item.shard)
        keys = [key.decode() for key in rows["key"][members].tolist()]
        views = batch.images[number].numpy()
        drawn = [
            draw_view(self.recipe, key, item.view, image.shape[1], image.shape[0])
            for key, image in zip(keys, decoded, strict=True)
        ]
        for image, params, view in zip(decoded, drawn, views, strict=False):  # more slots than members
            render(image, params, self.recipe, out=view)
        mix = draw_mix(self.recipe, self.names[item.shard], item.group, item.view, len(members))
        left, top, width, height = mix.box
        shown = np.arange(len(views)) % len(members)  # the member in each slot; unused slots repeat members
        views[len(members) :] = views[shown[len(members) :]]
        batch.labels[number] = torch.from_numpy(rows["label"][members[shown]].astype(np.int64))
        batch.weights[number, : len(members)] = 1
        batch.partner[number] = torch.from_numpy(mix.partner[shown])
        batch.lam[number] = mix.lam
        batch.box[number] = torch.tensor([left, top, left + width, top + height])
        checked = views[checked_member(item.group, item.view, len(members))]
        batch.checks.append(group_check("\n".join(keys).encode(), mix, checked))

    def _decode(self, item: Item, members: np.ndarray) -> tuple[list[np.ndarray], int]:
        """A group's images, and how many had to be decoded: none for consecutive views of a group."""
        identity = (item.shard, item.group, item.view // self.recipe.block)
        if self._decoded[0] == identity:
            return self._decoded[1], 0
        images = self.index.images(item.shard, members.tolist())
        self._decoded = (identity, images)
        return images, len(images)


def mixed(batch: Batch) -> torch.Tensor:
    """The batch's images after Mixup or CutMix, float32 (G * S, 3, P, P) in 0..255.

    timm.data.mixup.Mixup._mix_batch with the drawn lambda, box and partners: own * share + other * (1 - share), where
    a pixel's share is lambda, or 1 outside and 0 inside a box. A byte times n / 65536 fits into float32's 24 bits, as
    does the sum: nothing is rounded, so every device, with or without fused multiply-add, and every order of groups
    gives the same bits. Both images are read as bytes; one float32 buffer is written twice.
    """
    count, slots, _, size, _ = batch.images.shape
    first = torch.arange(0, count * slots, slots, device=batch.images.device)
    partners = (batch.partner + first[:, None]).flatten()
    other = batch.images.flatten(0, 1).index_select(0, partners).view_as(batch.images)
    share = _shares(batch, size)[:, None, None]
    return (batch.images * share).addcmul_(other, 1 - share).flatten(0, 1)


def _shares(batch: Batch, size: int) -> torch.Tensor:
    """The share of each pixel that comes from the slot's own image, float32 (G, P, P)."""
    left, top, right, bottom = batch.box[:, :, None].unbind(1)
    pixel = torch.arange(size, device=batch.box.device)
    across, down = (pixel >= left) & (pixel < right), (pixel >= top) & (pixel < bottom)
    outside = torch.where(right > left, 1.0, batch.lam[:, None])[:, :, None]  # without a box: everywhere
    return torch.where(down[:, :, None] & across[:, None, :], 0.0, outside)


def targets(batch: Batch, classes: int, smoothing: float) -> torch.Tensor:
    """Smoothed, mixed labels, float32 (G * S, classes): timm.data.mixup.mixup_target.

    Where a label is UNLABELLED, its share of the target is 0 for every class: it adds nothing to a cross-entropy.
    """
    off, on = smoothing / classes, 1 - smoothing + smoothing / classes
    own = batch.labels
    other = own.gather(1, batch.partner)
    lam = batch.lam[:, None, None]
    smooth = [_smoothed(labels, classes, off, on) for labels in (own, other)]
    return (smooth[0] * lam + smooth[1] * (1 - lam)).flatten(0, 1)


def _smoothed(labels: torch.Tensor, classes: int, off: float, on: float) -> torch.Tensor:
    """`on` for the label's class and `off` for the others, float32 (..., classes); 0 for all if it is UNLABELLED."""
    known = (labels != UNLABELLED)[..., None]
    values = torch.where(known, off, 0.0).expand(*labels.shape, classes).clone()
    return values.scatter_(-1, labels[..., None].clamp(min=0), torch.where(known, on, 0.0))


def checked_member(group: int, view: int, members: int) -> int:
    """The member whose view is hashed in the group's check; it changes from view to view."""
    return (group + view) % members


def group_check(keys: bytes, mix: Mix, view: np.ndarray) -> int:
    """A 64-bit checksum of a group in one view: its samples in order, its mixing, one member's view.

    Args:
        keys: the members' keys in slot order, joined.
        mix: how they are mixed; a changed lambda, box or partner changes the checksum.
        view: uint8 (3, size, size), the view of `checked_member` before mixing.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(len(keys).to_bytes(8, "little"))
    digest.update(keys)
    numbers = [("none", "mixup", "cutmix").index(mix.method), round(mix.lam * 2**40), *mix.box]
    digest.update(np.array(numbers, "<i8").tobytes())
    digest.update(mix.partner.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(view).data)
    return int.from_bytes(digest.digest(), "little")
