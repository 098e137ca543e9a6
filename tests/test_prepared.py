"""Indices of other data than the configured ones are refused, with the settings that differ."""

from pathlib import Path

import pytest
from conftest import make_data_set

from pipeline.common.errors import NotReady
from pipeline.config.paths import data_settings_path, index_path
from pipeline.config.schema import Config
from pipeline.shards.index import Index
from pipeline.shards.prepared import other_settings, record_settings
from pipeline.shards.published import open_index
from stages import prepare


@pytest.fixture
def config(in_tmp) -> Config:
    return make_data_set(in_tmp, {"cat": 3, "dog": 3}, {"cat": 1, "dog": 1})[0]


def changed(config: Config, **settings) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=settings)})


def test_a_changed_setting_is_refused_with_both_values_until_prepare_runs(config):
    other = changed(config, seed=5)
    with pytest.raises(NotReady, match=r"(?s)data\.seed: 0, 5 \(prepared, configured\).*run: pipeline prepare --quick"):
        open_index(other, "val")
    open_index(config, "val")
    prepare.run(other, quick=True)
    open_index(other, "val")
    with pytest.raises(NotReady, match=r"data\.seed: 5, 0"):
        open_index(config, "val")


@pytest.mark.parametrize("change", [{"workers": 2}, {"cache_gb": 1.0}, {"max_bad": 3}, {"download": True}])
def test_a_setting_that_changes_no_index_is_accepted(config, change):
    open_index(changed(config, **change), "train")


def test_of_existing_shards_settings_of_writing_are_not_compared(config):
    places = {split: f"{Index(index_path(config, split)).location}/*.tar" for split in ("train", "val")}
    shards = changed(config, source="shards", **places)
    prepare.run(shards)
    assert other_settings(changed(shards, exif_orientation=False, seed=3)) == []
    assert len(other_settings(changed(shards, label_key="class"))) == 1


def test_an_interrupted_prepare_is_refused_until_it_is_finished(config):
    record_settings(config, complete=False)
    with pytest.raises(NotReady, match="prepare was interrupted"):
        open_index(config, "train")
    prepare.run(config, quick=True)
    open_index(config, "train")


def test_a_prepare_that_was_interrupted_between_the_splits_is_refused_where_images_changed(config, monkeypatch):
    min(Path(config.data.train).glob("cat/*")).unlink()
    build = prepare.build

    def interrupted(config, shards, *arguments):
        if shards.split == "val":
            raise KeyboardInterrupt
        return build(config, shards, *arguments)

    monkeypatch.setattr(prepare, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config)
    with pytest.raises(NotReady, match="prepare was interrupted"):
        open_index(config, "val")


def test_indices_of_an_earlier_version_are_accepted(config):
    data_settings_path(config).unlink()
    open_index(changed(config, seed=5), "train")


def test_a_setting_that_a_later_version_adds_counts_as_its_default(config):
    path = data_settings_path(config)
    path.write_text(path.read_text().replace('"seed": 0,', ""))
    open_index(config, "train")
    assert other_settings(changed(config, seed=5)) == ["data.seed: 0, 5 (prepared, configured)"]
