"""Which store a command means."""

from pipeline.cli.scan import is_store_of, list_stores
from pipeline.common.errors import PipelineError, UsageError
from pipeline.config.paths import store_path
from pipeline.config.schema import Config
from pipeline.config.store_spec import StoreSpec
from pipeline.shards.index import Index
from pipeline.shards.published import open_index
from pipeline.store.manifest import read_manifest
from pipeline.store.reader import Store
from pipeline.store.sampling import check_sampling


def find_store(config: Config, spec: StoreSpec, named: str | None = None) -> Store:
    """Open a configuration's store: the one named by hand, that of its manifest, or the one of its index and recipe.

    Raises:
        PipelineError: there is none, or it is damaged.
        UsageError: there are several, or its classes were not drawn as configured.
    """
    index, published = open_index(config, "train"), spec.folder / "manifest.json"
    if named:
        path = named
    elif published.exists():
        path = store_path(config, read_manifest(published)["fingerprint"])
    else:
        path = _only_store(config, spec, index)
    store = Store.open(path, index, spec.recipe)
    check_sampling(store, spec)
    return store


def find_configured_store(config: Config, spec: StoreSpec, named: str | None = None) -> Store:
    """The same for exporting and publishing: unless it is named by hand, its teacher must be the configured one.

    Raises:
        PipelineError, UsageError: as `find_store`; or the teacher or its precision differs.
    """
    from pipeline.training.teachers import check_origin

    store = find_store(config, spec, named)
    if not named:
        check_origin(config, store, spec)
    return store


def _only_store(config: Config, spec: StoreSpec, index: Index) -> str:
    """The path of the only store of the configured index and recipe."""
    found = [path for path, held in list_stores(config.work) if is_store_of(spec, index.fingerprint, held)]
    if len(found) > 1:
        raise UsageError(
            f"{config.work}/stores: several stores of this index and recipe", expected="one", found=", ".join(found),
            do="name one with --store PATH: their teachers differ",
        )  # fmt: skip
    if not found:
        raise PipelineError(
            f"{config.work}/stores: no store of this index and recipe", do=f"run: {spec.command}"
        )
    return found[0]
