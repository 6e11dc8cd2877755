"""Models, and rows of a dataset: from the Hub, from a folder that ``save_to_disk`` wrote, or from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from examples.grpo.flags import InputError

__all__ = ["load_rows", "naming"]

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, config: str | None, split: str, columns: tuple[str, ...]) -> Dataset:
    """The rows of ``split``.

    Args:
        name: a dataset of the Hub, a folder that ``Dataset.save_to_disk`` wrote, or a JSON,
            CSV or Parquet file.
        config: the dataset's configuration, if it has several.
        split: the split; a file has only one.
        columns: the columns that the rows must have.

    Raises:
        InputError: there is no such dataset or split, or it lacks a column.
    """
    path = Path(name)
    try:
        if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            found = load_from_disk(name)
            rows = found[split] if isinstance(found, DatasetDict) else found
        elif path.is_file() and path.suffix in FORMATS:
            rows = load_dataset(FORMATS[path.suffix], data_files=name, split="train")
        else:
            rows = load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"dataset_name={name!r} with split {split!r} must be a dataset of the Hub that can be reached "
            f"from here, a folder written by save_to_disk, or a file ({', '.join(FORMATS)}). Check name, "
            f"split and network. It says: {reason}"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise InputError(
            f"dataset_name={name!r} has the columns {rows.column_names}, and needs {missing} as well"
        )
    return rows


@contextmanager
def naming(flag: str, name: str) -> Iterator[None]:
    """Turn the error of a model that the block cannot load into one that names the flag and its value."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{flag}={name!r} must be a folder or a model of the Hub that can be reached from here. "
            f"Transformers says: {reason}"
        ) from error
