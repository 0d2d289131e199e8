"""A quick check whether a name is a dataset of the Hugging Face hub; its own library may take minutes."""

from __future__ import annotations

import re
from pathlib import Path

from mtp_dist.errors import ConfigError

DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md", ".py", ".gz", ".zst", ".bin")
HUB_TIMEOUT_S = 10


def check_dataset_name(name: str, label: str) -> None:
    """Raise ConfigError, starting with `label`, if no cache has this dataset, and the hub lacks it or is unreachable.

    Without a network the datasets library retries for 25 seconds, even for a mistyped path.
    """
    missing = (
        f"{label} does not exist: name a folder, a file, 'python-stdlib', a synthetic task, or a Hugging Face dataset"
    )
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
    except Exception as error:  # the network and its libraries raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{label} cannot be checked: it is not a file or folder, and the hub is unreachable ({reason}): correct "
            "the path, or connect to the hub"
        ) from None


def _is_cached(name: str) -> bool:
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    prepared = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    downloaded = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
    return prepared.exists() or downloaded.exists()
