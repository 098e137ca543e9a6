"""The cosine between class and distillation token at every layer."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipeline.config.schema import Recipe, Student
from pipeline.models.build import build_student
from pipeline.models.tokens import TokenCosines

CPU = torch.device("cpu")
KWARGS = {"patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
PICTURES = 255 * torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def student(model: str = "deit_tiny_distilled_patch16_224"):
    return build_student(Student(model=model, kwargs=KWARGS), Recipe(size=16), 3, 16).eval()


def recorded(model, *batches: torch.Tensor, distilled: bool = True):
    cosines = TokenCosines(model, distilled)
    with torch.no_grad(), cosines.record():
        for pictures in batches:
            model(pictures)
    return cosines.gather(sum(len(pictures) for pictures in batches), CPU)


@torch.no_grad()
def by_hand(model, pictures: torch.Tensor) -> list[torch.Tensor]:
    """Cosines of every image at every layer: the model's own steps, one at a time."""
    inner = model.model
    x = inner._pos_embed(inner.patch_embed((pictures - model.mean) / model.std))
    layers = [x]
    for block in inner.blocks:
        layers.append(block(layers[-1]))
    layers.append(inner.norm(layers[-1]))
    return [cosine_similarity(x[:, 0], x[:, 1], dim=1).double() for x in layers]


def test_every_layer_is_as_computed_step_by_step():
    model = student()
    found = recorded(model, PICTURES[:2], PICTURES[2:])
    assert [each.layer for each in found] == ["parameters", "input", "1", "2", "3", "norm"]
    for each, expected in zip(found[1:], by_hand(model, PICTURES), strict=True):
        assert each.mean == pytest.approx(float(expected.mean()), abs=1e-5)
        assert each.deviation == pytest.approx(float(expected.std(correction=0)), abs=1e-5)
    tokens = (model.model.cls_token[0, 0].detach(), model.model.dist_token[0, 0].detach())
    assert found[0].mean == pytest.approx(float(cosine_similarity(*tokens, dim=0)), abs=1e-6)
    assert found[1].deviation < 1e-6 < found[-1].deviation  # images differ only after the first block


def test_equal_tokens_have_cosine_1_everywhere():
    model = student()
    with torch.no_grad():
        model.model.dist_token.copy_(model.model.cls_token)
        model.model.pos_embed[:, 1] = model.model.pos_embed[:, 0]
    assert all(each.mean == pytest.approx(1, abs=1e-5) for each in recorded(model, PICTURES))


def test_recording_changes_no_output_and_ends():
    model = student()
    with torch.no_grad():
        before = model(PICTURES)
        cosines = TokenCosines(model, True)
        with cosines.record():
            inside = model(PICTURES)
        model(PICTURES)
    assert all(torch.equal(a, b) for a, b in zip(before, inside, strict=True))
    assert len(cosines.gather(len(PICTURES), CPU)) == 6
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_a_trained_distillation_token_has_none():
    assert recorded(student("deit_tiny_patch16_224"), PICTURES) == []
    assert recorded(student(), PICTURES, distilled=False) == []
