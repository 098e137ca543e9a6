"""The contact sheet shows what students see, and says in words how it was made."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.batches.batch import Renderer, mixed
from pipeline.batches.plan import Item
from pipeline.cli.main import main
from pipeline.common.errors import UsageError
from pipeline.config.params import dump
from pipeline.config.policies import INCREASING_OPS, op_argument
from pipeline.config.schema import Recipe
from pipeline.report.contact_sheet import (
    MIN_SIDE,
    describe_op,
    describe_view,
    find_sample,
    group_section,
    mixed_view,
    op_section,
    sample_section,
)
from pipeline.report.grid import Cell, Section, draw_grid, wrap
from pipeline.views.draw import ViewParams


def test_a_description_names_crop_flip_ops_and_box():
    params = ViewParams((5, 6, 30, 40), True, (("Rotate", -7.25), ("Invert", None)), (1, 2, 3, 4), bytes(16))
    assert describe_view(params).splitlines() == [
        "crop 30 x 40 at 5, 6, flipped",
        "Rotate -7.2 degrees",
        "Invert",
        "erased 3 x 4 at 1, 2",
    ]


def test_the_description_of_a_plain_view_says_that_no_op_fired():
    assert describe_view(ViewParams((0, 0, 8, 8), False, (), None, bytes(16))) == "crop 8 x 8 at 0, 0\nno op"


@pytest.mark.parametrize("name", INCREASING_OPS)
def test_every_op_is_described(name):
    said = describe_op(name, op_argument(name, 9, True))
    assert name.startswith(said.split()[0].rstrip(","))


@pytest.mark.parametrize("caption", ["view 3: crop 300 x 412 at 120, 99, flipped\nRotate -7.2 degrees", "no op", "a\n\nb"])
def test_captions_are_as_wide_as_their_picture_at_most(caption):
    wrapped = wrap(caption, MIN_SIDE)
    text = FigureCanvasAgg(Figure(dpi=100)).figure.text(0, 0, wrapped, size=8)
    assert text.get_window_extent().width <= 100 * MIN_SIDE
    assert wrapped.split() == caption.split()


def cells_of(section: Section) -> list[Cell]:
    return [cell for row in section.rows for cell in row]


def test_a_sample_is_found_by_its_key(small_set):
    _, index = small_set
    key = index.rows(2)["key"][3].decode()
    assert find_sample(index, key) == (2, 3)


def test_an_unknown_key_is_answered_with_an_existing_one(small_set):
    _, index = small_set
    with pytest.raises(UsageError, match=index.rows(0)["key"][0].decode()):
        find_sample(index, "no such key")


def test_views_on_the_sheet_are_the_renderers(small_set):
    config, index = small_set
    cells = cells_of(sample_section(index, config.recipe, 1, 2, range(3, 4)))
    renderer = Renderer(index, config.recipe)
    for group in range(2):
        batch = renderer.render([Item(1, group, 3)])
        if 2 in batch.members[0]:
            seen = batch.images[0, batch.members[0].tolist().index(2)].permute(1, 2, 0).numpy()
    assert np.array_equal(cells[1].picture, seen)


def test_the_group_on_the_sheet_is_what_is_trained_on_with_the_sample_first(small_set):
    config, index = small_set
    section = group_section(index, config.recipe, 1, 2, 3, 99)
    cells, number = cells_of(section), int(section.title.split()[1])
    batch = Renderer(index, config.recipe).render([Item(1, number, 3)])
    pictures = mixed(batch).round().byte().permute(0, 2, 3, 1).numpy()
    first = batch.members[0].tolist().index(2)
    assert np.array_equal(cells[0].picture, pictures[first]) and len(cells) == len(batch.members[0])


def test_a_mixed_group_says_its_lambda(small_set):
    _, index = small_set
    recipe = Recipe(size=16, group_size=4, repeats=2, block=4, cutmix_alpha=0)
    section = group_section(index, recipe, 1, 2, 0, 4)
    share = section.title.split("lambda ")[1].split(";")[0]
    own = [float(cell.caption.split()[0]) for cell in cells_of(section) if "\n" in cell.caption]  # an odd one stays alone
    assert "mixup" in section.title and own and set(own) == {round(float(share), 2)}


def test_an_unmixed_group_says_so(small_set):
    _, index = small_set
    recipe = Recipe(size=16, group_size=4, repeats=2, block=4, mix_prob=0)
    assert "not mixed" in group_section(index, recipe, 1, 2, 0, 4).title


def test_the_first_view_in_which_the_group_is_mixed_is_shown(small_set):
    _, index = small_set
    recipe = Recipe(size=16, group_size=4, repeats=2, block=4, mix_prob=0.2)
    mixed_ones = [view for view in range(40) if "not mixed" not in group_section(index, recipe, 1, 2, view, 4).title]
    assert mixed_view(index, recipe, 1, 2, range(40)) == mixed_ones[0] > 0
    assert mixed_view(index, recipe, 1, 2, range(mixed_ones[0])) == 0


def test_the_sheet_of_ops_has_a_cell_per_op_and_magnitude(small_set):
    config, index = small_set
    cells = cells_of(op_section(index, config.recipe, 0, 0))
    without = sum(op_argument(name, 5, False) is None for name in INCREASING_OPS)
    assert len(cells) == 1 + without + 4 * (len(INCREASING_OPS) - without)


def test_a_sheet_is_a_png_as_wide_as_its_pictures(tmp_path):
    row = [Cell(np.full((80, 80, 3), 9, np.uint8), "one\nline")] * 4
    draw_grid(tmp_path / "sheet.png", [Section([row, row[:1]], "title")], side=2.4)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG" and 4 * 240 < image.width < 4 * 240 + 100


def test_the_command_draws_a_random_sample(small_set, tmp_path, monkeypatch):
    config, index = small_set
    monkeypatch.chdir(Path(index.location).parents[3])
    (tmp_path / "params.yaml").write_text(dump(config))
    options = ["--config", str(tmp_path / "params.yaml"), "--output", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(main, ["views", *options, "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sheet.png").exists() and "sheet.png" in result.output


def test_a_title_is_wrapped_to_the_sheet(tmp_path):
    row = [Cell(np.full((32, 32, 3), 9, np.uint8), "one")]
    sizes = []
    for title in ("short", "a title of very many words, " * 4):
        draw_grid(tmp_path / "sheet.png", [Section([row], title)], side=1.6)
        with Image.open(tmp_path / "sheet.png") as image:
            sizes.append(image.size)
            right = np.asarray(image.convert("L"))[:, -8:]
        assert (right == 255).all(), "text runs into the right edge"
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]
