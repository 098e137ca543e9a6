"""Whether weights that timm names are available: from the local cache, or from the Hugging Face Hub."""

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from timm.models import get_pretrained_cfg

FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm looks for in a repository, in this order."""
TIMEOUT = 10.0
"""Seconds to wait for the hub."""


def missing_weights(tag: str, offline: bool = False) -> str:
    """Why a timm tag's weights are not available; empty if they are. timm itself tries for a minute before it says so.

    Args:
        tag: one of timm's, or hf-hub: and a repository.
        offline: ask only the local cache.
    """
    hub, colon, repository = tag.partition(":")
    if not colon:
        try:
            known = get_pretrained_cfg(tag, allow_unregistered=False)
        except RuntimeError:
            return "timm has no such weights"
        repository = known.hf_hub_id if known else None
        if not repository:
            return "" if known and known.url else "timm names no repository for them"
    elif hub not in ("hf-hub", "hf_hub"):
        return ""
    repository, _, revision = repository.partition("@")
    try:
        if any(isinstance(try_to_load_from_cache(repository, name, revision=revision or None), str) for name in FILES):
            return ""
        return "they are not in the local cache" if offline else _missing_on_hub(repository, revision or None)
    except HFValidationError:
        return f"{repository!r} is not a repository name"


def _missing_on_hub(repository: str, revision: str | None) -> str:
    for name in FILES:
        try:
            get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=TIMEOUT)
            return ""
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError:  # gated ones, too
            return f"{repository} is not on the hub, or needs an access token"
        except HFValidationError:
            raise
        except HfHubHTTPError:  # the hub is there, but busy: timm tries again
            return ""
        except Exception as error:  # requests, httpx and the hub's own errors share no base
            return f"not in the local cache, and the hub cannot be reached ({type(error).__name__})"
    return f"neither in the local cache nor in {repository} on the hub"
