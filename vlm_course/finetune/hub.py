"""Checkpoints and records of the Hugging Face hub, fetched only when they are named; kept in the hub's own cache.

A checkpoint is named as the hub does, `owner/name`; a file of a dataset is `hub:owner/name/path/in/it.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

CHECKPOINT = re.compile(r"\w[\w.-]*/\w[\w.-]*")
DATA = re.compile(r"hub:([\w.-]+/[\w.-]+)/(.+\.jsonl?)")
FILES = ["*.json", "*.safetensors", "tokenizer.model"]  # some repositories hold their weights a second time, as .bin


def is_checkpoint(name: str) -> bool:
    """Whether `name` can be a repository of the hub and is no folder here."""
    return bool(CHECKPOINT.fullmatch(name)) and not Path(name).expanduser().exists()


def checkpoint(name: str) -> Path:
    """The folder of a checkpoint `owner/name`, downloaded where the hub's cache does not have it.

    Raises:
        ValueError: it cannot be had; one sentence says why.
    """
    from huggingface_hub import snapshot_download

    return Path(_fetched(name, lambda: snapshot_download(name, allow_patterns=FILES)))


def records(name: str) -> Path:
    """The file of records `hub:owner/name/file.json`, downloaded where the hub's cache does not have it.

    Raises:
        ValueError: the name has another form, or the file cannot be had; one sentence says why.
    """
    from huggingface_hub import hf_hub_download

    found = DATA.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} names no file of a dataset: expected hub:owner/name/file.json")
    return Path(_fetched(name, lambda: hf_hub_download(found[1], found[2], repo_type="dataset")))


def _fetched(name: str, fetch: Callable[[], str]) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return fetch()
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:  # it is not in the cache either
        why = "HF_HUB_OFFLINE forbids the hub" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        raise ValueError(f"{name} cannot be fetched, since {why}: name a file or folder of this machine") from error
    except GatedRepoError as error:
        raise ValueError(f"{name} asks for its terms to be accepted: do so on the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub knows no {name}: check the name, or log in with `hf auth login`") from error
    except EntryNotFoundError as error:
        raise ValueError(f"the hub has the repository of {name}, but not this file in it: check its path") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be fetched ({type(error).__name__}: {error})") from error
