# SPDX-License-Identifier: Apache-2.0
"""What the classification examples share: data, metric, and one sentence for bad input.

The data are the user's, or without a network scikit-learn's digits or the docstrings of Python's standard library.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from transformers import EvalPrediction

SPLIT_SEED = 0
SPLITS = ("train", "validation", "test")
FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
SPLIT_SHARES = (0.70, 0.15, 0.15)

# Topic: top-level modules of the standard library. Modules that a Python release lacks are skipped.
TOPIC_MODULES = {
    "concurrency": """asyncio concurrent multiprocessing queue sched selectors subprocess asyncore threading
        _threading_local contextvars asynchat""",
    "data formats": """aifc base64 calendar chunk csv configparser datetime _pydatetime _strptime json pickle
        pickletools plistlib quopri shelve sndhdr struct sunau tomllib uu wave xdrlib xml zoneinfo html colorsys""",
    "files and system": """_pyio bz2 filecmp fileinput fnmatch genericpath getpass glob gzip io lzma mimetypes netrc
        ntpath os pathlib platform posixpath pty shutil stat tarfile tempfile zipapp zipfile compression""",
    "language": """_collections_abc abc ast codeop compileall copy copyreg dataclasses dis enum functools importlib
        inspect keyword lib2to3 modulefinder opcode operator pkgutil py_compile runpy symtable tabnanny token tokenize
        types typing weakref _weakrefset imp zipimport annotationlib""",
    "networking": """cgi cgitb ftplib http imaplib ipaddress mailbox mailcap nntplib poplib email smtpd smtplib socket
        socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc nturl2path""",
    "numbers": """_pydecimal _pylong bisect collections decimal fractions hashlib heapq hmac numbers random secrets
        statistics graphlib""",
    "testing": """bdb cProfile cmd code doctest logging pdb profile pstats pyclbr pydoc timeit trace traceback
        tracemalloc unittest warnings""",
    "text": """_markupbase argparse codecs difflib encodings getopt gettext linecache locale optparse pprint re
        reprlib sre_compile sre_parse string stringprep textwrap shlex""",
    "user interface": """_pyrepl curses idlelib rlcompleter tkinter turtle turtledemo""",
}
MAX_SENTENCES_PER_MODULE, MIN_WORDS, MAX_WORDS, OPENING_WORDS = 250, 6, 60, 6


@dataclass
class DataTrainingArguments:
    """Where the data comes from. With none of these, it is embedded."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Local .parquet, .csv, .json or .jsonl file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a share of the training data."})
    test_file: str | None = field(default=None, metadata={"help": "Default: no test."})
    input_column: str | None = field(default=None, metadata={"help": "Default: text or sentence; image or img."})
    label_column: str | None = field(default=None, metadata={"help": "Default: label or labels."})
    validation_share: float = field(default=0.15, metadata={"help": "Of the training data, where no split is there."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for validation and test."})


def load_splits(arguments: DataTrainingArguments, embedded: Callable[[], DatasetDict], *usual: str) -> DatasetDict:
    """Load and check the data.

    Args:
        arguments: what the user asked for.
        embedded: makes the data where the user named none.
        usual: names of the column of inputs.

    Returns:
        Splits train, validation and perhaps test, with the columns `labels` and `usual[0]`.

    Raises:
        ValueError, OSError, DatasetsError: something about the data is wrong.
    """
    files = {split: file for split in SPLITS if (file := getattr(arguments, f"{split}_file")) is not None}
    if arguments.dataset_name is not None and files:
        raise ValueError("Give either --dataset_name or local files, not both.")
    if arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    elif files:
        formats = {FORMATS.get(Path(file).suffix, "") for file in files.values()}
        if "train" not in files or len(formats) > 1 or "" in formats:
            raise ValueError(f"Local files must have one format ({', '.join(FORMATS)}) and include a --train_file.")
        splits = load_dataset(formats.pop(), data_files=files)
    else:
        splits = embedded()
    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {', '.join(splits)}.")

    columns = splits["train"].column_names
    for new, names in (
        (usual[0], [arguments.input_column] if arguments.input_column else usual),
        ("labels", [arguments.label_column] if arguments.label_column else ("label", "labels")),
    ):
        old = next((name for name in names if name in columns), None)
        if old is None:
            raise ValueError(f"No column {' or '.join(names)}: the columns are {', '.join(columns)}.")
        splits = splits if old == new else splits.rename_column(old, new)
    splits = splits.select_columns([usual[0], "labels"])
    if not isinstance(splits["train"].features["labels"], ClassLabel):
        values = splits["train"].unique("labels")
        if not all(isinstance(value, int | str) for value in values) or len(values) < 2:
            raise ValueError(f"Labels must be at least two different numbers or strings, found {values[:5]}.")
        label = ClassLabel(names=[str(value) for value in sorted(values)])
        splits = splits.cast_column("labels", Value("string")).cast_column("labels", label)
    if "test" in splits and splits["test"].unique("labels") == [-1]:  # hidden, as in GLUE
        del splits["test"]
    if "validation" not in splits:
        parts = splits["train"].train_test_split(arguments.validation_share, seed=SPLIT_SEED)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    splits = DatasetDict({name: splits[name] for name in SPLITS if name in splits})
    for name, split in splits.items():
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        if limit is not None and limit < 1:
            raise ValueError(f"A limit of {limit} samples leaves the {name} split empty: give 1 or more.")
        if limit is not None:
            splits[name] = split.shuffle(seed=SPLIT_SEED).select(range(min(limit, len(split))))
    return splits


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the script with one sentence where arguments or data are wrong."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, DatasetsError) as error:  # Arrow has casts not implemented
        # A DatasetsError says only that something went wrong.
        cause = error.__cause__ if isinstance(error, DatasetsError) else None
        sys.exit(f"error: {' '.join(str(cause or error).split())}")


class AccuracyAndF1(evaluate.Metric):
    """Share of right predictions, and the mean of the classes' F1 scores."""

    def _info(self) -> evaluate.MetricInfo:
        columns = Features({"predictions": Value("int32"), "references": Value("int32")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=columns)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        macro_f1 = f1_score(references, predictions, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(references, predictions)), "macro_f1": float(macro_f1)}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What a Trainer reports after each evaluation."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    metric = AccuracyAndF1(keep_in_memory=True)  # no file that runs beside each other could share
    return metric.compute(predictions=logits.argmax(-1), references=prediction.label_ids)


def load_digits_images() -> DatasetDict:
    """Load scikit-learn's handwritten digits: columns `image` and `label`; stratified splits, always the same."""
    digits = load_digits()
    labels, seed = digits.target, SPLIT_SEED
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=seed)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # grey values from 0 to 16
    images = [PIL.Image.fromarray(image) for image in pixels]
    rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return DatasetDict(
        {split: rows.select(part) for split, part in zip(SPLITS, (train, validation, test), strict=True)}
    )


def load_docstring_sentences() -> DatasetDict:
    """Load the sentences of the standard library's docstrings, each labelled with the topic of its module.

    Only source files are read; nothing is imported. A module stands in one split only. Sentences that open with the
    same words count as duplicates: one is kept, or none where they belong to different topics. The words of
    `hidden_words` are taken out.

    Returns:
        Columns `text`, `label` and `module` in the splits train, validation and test: the same for a Python release.
    """
    hidden = hidden_words()
    by_opening: dict[str, tuple[str, str, str] | None] = {}
    for topic, module, path in topic_files():
        for sentence in docstring_sentences(path):
            text = strip_words(sentence, hidden | set(module.lower().split(".")))
            words = normalised_words(text)
            if MIN_WORDS <= len(words) <= MAX_WORDS:
                opening = " ".join(words[:OPENING_WORDS])
                known = by_opening.setdefault(opening, (topic, module, text))
                if known and known[0] != topic:
                    by_opening[opening] = None
    texts: dict[str, dict[str, list[str]]] = {topic: defaultdict(list) for topic in TOPIC_MODULES}
    for topic, module, text in filter(None, by_opening.values()):
        if len(texts[topic][module]) < MAX_SENTENCES_PER_MODULE:
            texts[topic][module].append(text)
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for topic, texts_of in texts.items():
        for module, split in assign_modules({module: len(found) for module, found in texts_of.items()}).items():
            rows[split] += [{"text": text, "label": topic, "module": module} for text in texts_of[module]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=[*texts]), "module": Value("string")})
    return DatasetDict({split: Dataset.from_list(rows[split], features=features) for split in SPLITS})


def hidden_words() -> set[str]:
    """The words that no sentence may contain: the names of all the modules and the words of the topics."""
    modules = [name for names in TOPIC_MODULES.values() for name in names.lower().split()]
    topics = {word for topic in TOPIC_MODULES for word in topic.split()}
    return {"idle", "python", "py", *modules, *(name.lstrip("_") for name in modules)} | topics - {"and"}


def strip_words(text: str, words: set[str]) -> str:
    """Remove whole words, given in lower case, in any case and also with a plural s; white space becomes blanks."""

    def keep(match: re.Match[str]) -> str:
        word = match.group().lower()
        return "" if words & {word, word.strip("_"), word.removesuffix("s")} else match.group()

    return " ".join(re.sub(r"\w+", keep, text).split())


def normalised_words(text: str) -> list[str]:
    """The words of a text in lower case, without digits and signs."""
    return re.findall(r"[a-z]{2,}", text.lower())


def assign_modules(sizes: dict[str, int]) -> dict[str, str]:
    """Share modules of these numbers of sentences among the splits: the largest first, each where most are missing."""
    order = sorted(sizes)
    random.Random(SPLIT_SEED).shuffle(order)
    missing = {split: share * sum(sizes.values()) for split, share in zip(SPLITS, SPLIT_SHARES, strict=True)}
    assigned = {}
    for module in sorted(order, key=lambda module: -sizes[module]):
        assigned[module] = max(SPLITS, key=lambda split: missing[split])
        missing[assigned[module]] -= sizes[module]
    return assigned


def topic_files() -> Iterator[tuple[str, str, Path]]:
    """Yield topic, dotted module name and path of every source file of the topics, tests excluded."""
    library = Path(sysconfig.get_path("stdlib"))
    for topic, modules in TOPIC_MODULES.items():
        for module in modules.split():
            single = library / f"{module}.py"
            for path in [*([single] if single.is_file() else []), *sorted((library / module).rglob("*.py"))]:
                parts = path.relative_to(library).with_suffix("").parts
                if not {"test", "tests", "idle_test"} & set(parts):
                    yield topic, ".".join(part for part in parts if part != "__init__"), path


def docstring_sentences(path: Path) -> Iterator[str]:
    """Yield the sentences of a source file's docstrings, in the order of the file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                if not paragraph.lstrip().startswith(">>>"):
                    yield from re.split(r"(?<=[.!?])\s+", paragraph)
