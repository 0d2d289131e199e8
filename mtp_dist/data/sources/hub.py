"""Whether a name can be a dataset of the Hugging Face hub, found out without the minutes that its library may take."""

from __future__ import annotations

import re
from pathlib import Path

from mtp_dist.errors import ConfigError

DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md", ".py", ".gz", ".zst", ".bin")
HUB_TIMEOUT_S = 10


def check_dataset_name(name: str, named: str) -> None:
    """Raise ConfigError, which begins with `named`, if the hub does not have this dataset and no cache does.

    The datasets library asks the hub six times over 25 seconds when there is no network, also for a mistyped path.
    """
    missing = f"{named} does not exist: give a folder, a file, 'python-stdlib', or the name of a Hugging Face dataset"
    if not DATASET_NAME.fullmatch(name) or name.lower().endswith(FILE_SUFFIXES):
        raise ConfigError(missing)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if _is_cached(name):
        return
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        raise ConfigError(f"{missing} (the hub has no public dataset '{name}')") from None
    except Exception as error:  # whatever the network and its libraries raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{missing} (the hub cannot be asked for '{name}': {reason})") from None


def _is_cached(name: str) -> bool:
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    prepared = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    downloaded = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
    return prepared.exists() or downloaded.exists()
