# SPDX-License-Identifier: Apache-2.0
"""Loading and checking the data of the example scripts: every fault is one `DataError` with one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset

FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.15


class DataError(ValueError):
    """The data cannot be trained on; the message says which value is wrong and what is allowed."""


@dataclass
class DataArguments:
    """Where the data comes from. With none of these, an embedded data set is used."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_file: str | None = field(default=None, metadata={"help": "Local .parquet, .csv, .json or .jsonl file."})
    validation_file: str | None = field(
        default=None, metadata={"help": "As train_file. Without one, a share of the training data is held out."}
    )
    test_file: str | None = field(default=None, metadata={"help": "As train_file. Without one, nothing is tested."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels (default: label)."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for validation and test."})
    metric: str | None = field(default=None, metadata={"help": "One more metric of the Hub, for evaluate.load."})


@dataclass
class LabelledData:
    """Checked splits with integer labels."""

    splits: DatasetDict
    input_column: str
    label_column: str
    label_names: list[str]


def load_data(
    arguments: DataArguments,
    embedded: Callable[[], DatasetDict],
    input_column: str | None,
    input_candidates: Sequence[str],
    seed: int = 0,
) -> LabelledData:
    """Load the splits, find the columns and turn the labels into numbers.

    Args:
        arguments: what the user asked for.
        embedded: builds the data set to use when the user named none.
        input_column: column of the inputs, or None to look for one of the candidates.
        input_candidates: usual names of that column.
        seed: of the random parts.

    Returns:
        The data, with a train and a validation split and perhaps a test split.

    Raises:
        DataError: anything about the data is wrong.
    """
    splits = _load_splits(arguments, embedded)
    if "train" not in splits:
        raise DataError(f"The data has no train split: it has {', '.join(splits)}.")
    splits = DatasetDict({name: splits[name] for name in SPLITS if name in splits})
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"The {name} split is empty: at least one row is needed.")
    columns = splits["train"].column_names
    input_column = _find_column(columns, input_column, input_candidates)
    label_column = _find_column(columns, arguments.label_column, ("label", "labels"))
    for name, split in splits.items():
        for column in (input_column, label_column):
            if column not in split.column_names:
                found = ", ".join(split.column_names)
                raise DataError(f"The {name} split has no column {column!r}: its columns are {found}.")
    splits, label_names = _encode_labels(splits, label_column)
    if "validation" not in splits:
        splits = _hold_out_validation(splits)
    for name, limit in (
        ("train", arguments.max_train_samples),
        ("validation", arguments.max_eval_samples),
        ("test", arguments.max_eval_samples),
    ):
        if limit is not None and limit < 1:
            raise DataError(f"A limit of {limit} samples leaves the {name} split empty: give 1 or more.")
        if limit is not None and name in splits:
            splits[name] = splits[name].shuffle(seed=seed).select(range(min(limit, len(splits[name]))))
    return LabelledData(splits, input_column, label_column, label_names)


def _load_splits(arguments: DataArguments, embedded: Callable[[], DatasetDict]) -> DatasetDict:
    """Load all splits from the place that the arguments name."""
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    files = {split: file for split, file in files.items() if file is not None}
    if arguments.dataset_name is not None:
        if files:
            raise DataError("Give either --dataset_name or local files, not both.")
        try:
            return load_dataset(arguments.dataset_name, arguments.dataset_config_name)
        except Exception as error:  # the Hub client raises many kinds
            raise DataError(
                f"The data set {arguments.dataset_name!r} cannot be loaded ({_first_line(error)}): give the name of a "
                "data set on the Hub that can be reached, a local folder, or local files with --train_file."
            ) from None
    if not files:
        return embedded()
    if "train" not in files:
        raise DataError(f"--train_file is missing: only {', '.join(f'--{split}_file' for split in files)} was given.")
    return DatasetDict({split: _load_file(file) for split, file in files.items()})


def _load_file(file: str) -> Dataset:
    """Load one local file as a dataset."""
    path = Path(file)
    if path.suffix not in FILE_FORMATS:
        raise DataError(f"The file {file!r} has an unknown ending: allowed are {', '.join(FILE_FORMATS)}.")
    if not path.is_file():
        raise DataError(f"The file {file!r} does not exist.")
    if path.stat().st_size == 0:
        raise DataError(f"The file {file!r} is empty: at least one row is needed.")
    try:
        if path.suffix == ".parquet":
            return Dataset.from_parquet(file)
        return load_dataset(FILE_FORMATS[path.suffix], data_files=file, split="train")
    except Exception as error:  # the readers of the formats raise many kinds
        if "corresponds to no data" in str(error):  # what datasets says about a table without rows
            raise DataError(f"The file {file!r} is empty: at least one row is needed.") from None
        kind = FILE_FORMATS[path.suffix]
        # What datasets raises says only that something went wrong, and keeps the reader's own error as the cause.
        raise DataError(
            f"The file {file!r} cannot be read as {kind} ({_first_line(error.__cause__ or error)})."
        ) from None


def _find_column(columns: list[str], wanted: str | None, candidates: Sequence[str]) -> str:
    """Return the wanted column, or else the first candidate that exists."""
    names = (wanted,) if wanted is not None else candidates
    for name in names:
        if name in columns:
            return name
    raise DataError(f"The data has no column {' or '.join(map(repr, names))}: its columns are {', '.join(columns)}.")


def _encode_labels(splits: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """Number the labels in the order of their names; all labels must occur in, or be declared by, the train split.

    The other splits' labels are matched by name where they have names, since each may number them in its own order.
    """
    declared = splits["train"].features[column]
    if isinstance(declared, ClassLabel):
        names = list(declared.names)
        known = {number: number for number in range(len(names))}
    elif not isinstance(declared, Value):
        raise DataError(
            f"The labels in column {column!r} are of type {type(declared).__name__}: allowed are numbers and strings."
        )
    else:
        values = splits["train"].unique(column)
        if any(value is None for value in values):
            raise DataError(f"The column {column!r} of the train split has rows without a label.")
        if not all(isinstance(value, int | str) for value in values):
            kind = type(next(value for value in values if not isinstance(value, int | str))).__name__
            raise DataError(f"The labels in column {column!r} are of type {kind}: allowed are numbers and strings.")
        values = sorted(values)
        names = [str(value) for value in values]
        known = {value: number for number, value in enumerate(values)}
    if len(names) < 2:
        raise DataError(f"The column {column!r} holds one label only, {names[0]!r}: at least two are needed.")

    by_name = {name: number for number, name in enumerate(names)}
    encoded = {}
    for name, split in splits.items():
        values = split[column][:]
        own = split.features[column]
        if name == "test" and set(values) == {-1} and -1 not in known:
            print("The test split's labels are hidden (all are -1): nothing will be tested.")
            continue
        if isinstance(own, ClassLabel) and (isinstance(declared, ClassLabel) or set(own.names) & set(names)):
            values = [own.names[value] if value is not None and value >= 0 else value for value in values]
        numbers = [known.get(value, by_name.get(value if value is None else str(value))) for value in values]
        unknown = sorted({str(value) for value, number in zip(values, numbers, strict=True) if number is None})
        if unknown:
            shown = ", ".join(map(repr, unknown[:5]))
            raise DataError(
                f"The {name} split has labels that the train split does not know: {shown}; "
                f"known are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
            )
        encoded[name] = (
            split.remove_columns(column).add_column(column, numbers).cast_column(column, ClassLabel(names=names))
        )
    return DatasetDict(encoded), names


def _hold_out_validation(splits: DatasetDict) -> DatasetDict:
    """Take the validation split from the training data, at random but always the same rows."""
    train = splits["train"]
    if len(train) < 2:
        raise DataError("The train split has one row only: none is left for validation.")
    parts = train.train_test_split(test_size=max(1, round(HELD_OUT_SHARE * len(train))), seed=0)
    return DatasetDict({**splits, "train": parts["train"], "validation": parts["test"]})


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
