# SPDX-License-Identifier: Apache-2.0
"""Two small real data sets without a network: scikit-learn's digits, and the docstrings of the standard library."""

from __future__ import annotations

import ast
import io
import math
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

SPLIT_SEED = 0
SPLITS = ("train", "validation", "test")
SPLIT_SHARES = (0.70, 0.15, 0.15)

# Topic -> top-level modules of the standard library. Modules that a Python release lacks are skipped.
TOPIC_MODULES = {
    "concurrency": (
        "asyncio concurrent multiprocessing queue sched selectors subprocess asyncore threading _threading_local "
        "contextvars asynchat"
    ),
    "data formats": (
        "aifc base64 calendar chunk csv configparser datetime _pydatetime _strptime json pickle pickletools plistlib "
        "quopri shelve sndhdr struct sunau tomllib uu wave xdrlib xml zoneinfo html colorsys"
    ),
    "files and system": (
        "_pyio bz2 filecmp fileinput fnmatch genericpath getpass glob gzip io lzma mimetypes netrc ntpath os pathlib "
        "platform posixpath pty shutil stat tarfile tempfile zipapp zipfile compression"
    ),
    "language": (
        "_collections_abc abc ast codeop compileall copy copyreg dataclasses dis enum functools importlib inspect "
        "keyword lib2to3 modulefinder opcode operator pkgutil py_compile runpy symtable tabnanny token tokenize types "
        "typing weakref _weakrefset imp zipimport annotationlib"
    ),
    "networking": (
        "cgi cgitb ftplib http imaplib ipaddress mailbox mailcap nntplib poplib email smtpd smtplib socket "
        "socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc nturl2path"
    ),
    "numbers": (
        "_pydecimal _pylong bisect collections decimal fractions hashlib heapq hmac numbers random secrets statistics "
        "graphlib"
    ),
    "testing": (
        "bdb cProfile cmd code doctest logging pdb profile pstats pyclbr pydoc timeit trace traceback tracemalloc "
        "unittest warnings"
    ),
    "text": (
        "_markupbase argparse codecs difflib encodings getopt gettext linecache locale optparse pprint re reprlib "
        "sre_compile sre_parse string stringprep textwrap shlex"
    ),
    "user interface": "_pyrepl curses idlelib rlcompleter tkinter turtle turtledemo",
}
MAX_SENTENCES_PER_MODULE = 250
MIN_WORDS, MAX_WORDS = 6, 60
OPENING_WORDS = 6
NEAR_DUPLICATE_SIMILARITY = 0.6


def load_digits_images() -> DatasetDict:
    """Load scikit-learn's handwritten digits as a dataset of images.

    Returns:
        Columns ``image`` and ``label`` in the splits train, validation and test: stratified, always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=SPLIT_SEED)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [{"bytes": _png(digits.images[index]), "path": None} for index in rows],
                    "label": [int(labels[index]) for index in rows],
                },
                features=features,
            )
            for split, rows in zip(SPLITS, (train, validation, test), strict=True)
        }
    )


def _png(pixels: np.ndarray) -> bytes:
    """Encode one 8 x 8 scan with grey values from 0 to 16."""
    buffer = io.BytesIO()
    PIL.Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def load_docstring_sentences() -> DatasetDict:
    """Load the sentences of the standard library's docstrings, each labelled with the topic of its module.

    Only source files are read; nothing is imported. A module stands in one split only. Sentences that open with the
    same words count as duplicates: one is kept, or none where they belong to different topics. Of sentences in
    different splits whose sets of words have a Jaccard similarity of 0.6 or more, the one nearer to the training goes.

    Returns:
        Columns ``text``, ``label`` and ``module`` in the splits train, validation and test: the same ones for the same
        Python release.
    """
    names_to_hide = hidden_words()
    by_module: dict[tuple[str, str], list[str]] = {}
    topics_of_opening: dict[str, set[str]] = defaultdict(set)
    for topic, module, path in _topic_files():
        sentences: dict[str, str] = {}
        for sentence in _docstring_sentences(path):
            text = strip_words(sentence, names_to_hide | set(module.lower().split(".")))
            words = normalised_words(text)
            if MIN_WORDS <= len(words) <= MAX_WORDS:
                sentences.setdefault(_opening(text), text)
        fresh = [text for opening, text in sentences.items() if topic not in topics_of_opening[opening]]
        for opening in sentences:
            topics_of_opening[opening].add(topic)
        by_module[topic, module] = fresh
    for key, sentences_of_module in by_module.items():
        unique = [text for text in sentences_of_module if len(topics_of_opening[_opening(text)]) == 1]
        by_module[key] = unique[:MAX_SENTENCES_PER_MODULE]

    rows: dict[str, dict[str, list]] = {split: {"text": [], "label": [], "module": []} for split in SPLITS}
    topics = list(TOPIC_MODULES)
    for topic in topics:
        sizes = {module: len(texts) for (owner, module), texts in by_module.items() if owner == topic and texts}
        for module, split in assign_modules(sizes).items():
            for text in by_module[topic, module]:
                rows[split]["text"].append(text)
                rows[split]["label"].append(topics.index(topic))
                rows[split]["module"].append(module)
    nearer_to_test_first = {split: rows[split]["text"] for split in reversed(SPLITS)}
    for split, kept in without_near_duplicates(nearer_to_test_first, NEAR_DUPLICATE_SIMILARITY).items():
        rows[split] = {name: [column[row] for row in kept] for name, column in rows[split].items()}
    features = Features({"text": Value("string"), "label": ClassLabel(names=topics), "module": Value("string")})
    return DatasetDict({split: Dataset.from_dict(columns, features=features) for split, columns in rows.items()})


def hidden_words() -> set[str]:
    """Return the words that no sentence may contain: the names of all the modules and the words of the topics."""
    words = {"idle", "python", "py"}
    for topic, modules in TOPIC_MODULES.items():
        words.update(topic.split())
        words.update(modules.lower().split())
        words.update(name.lstrip("_") for name in modules.lower().split())
    return words - {"and"}


def strip_words(text: str, words: set[str]) -> str:
    """Remove whole words, in any case and also with a plural s, from a text.

    Args:
        text: any text.
        words: lower-case words.

    Returns:
        The text without them, its white space made single blanks.
    """

    def keep(match: re.Match[str]) -> str:
        word = match.group().lower()
        return "" if word in words or word.strip("_") in words or word.removesuffix("s") in words else match.group()

    return " ".join(re.sub(r"\w+", keep, text).split())


def normalised_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without digits and signs."""
    return re.findall(r"[a-z]{2,}", text.lower())


def similarity(first: set[str], second: set[str]) -> float:
    """Return the Jaccard similarity of two sets of words: the share of words in both among those in either."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def without_near_duplicates(splits: dict[str, list[str]], bound: float) -> dict[str, list[int]]:
    """Find the texts that resemble no kept text of an earlier split.

    Args:
        splits: the texts of each split, those that shall lose nothing first.
        bound: the similarity of two sets of words, in (0, 1], from which on two texts count as near-duplicates.

    Returns:
        The numbers of the texts to keep in each split.
    """
    sets = {split: [set(normalised_words(text)) for text in texts] for split, texts in splits.items()}
    count = Counter(word for words in sets.values() for each in words for word in each)

    def rarest(words: set[str]) -> list[str]:
        # Two sets of this similarity share at least the share `bound` of the words of either. So they share one of the
        # first few in any common order, and with the rarest words first, few other sets share it.
        fewest_shared = math.ceil(bound * len(words) - 1e-9)
        return sorted(words, key=lambda word: (count[word], word))[: len(words) - fewest_shared + 1]

    earlier: dict[str, list[set[str]]] = defaultdict(list)

    def resembles_an_earlier_one(words: set[str]) -> bool:
        shortest, longest = bound * len(words), len(words) / bound
        others = (other for word in rarest(words) for other in earlier[word] if shortest <= len(other) <= longest)
        return any(similarity(words, other) >= bound for other in others)

    keep: dict[str, list[int]] = {}
    for split, texts in sets.items():
        keep[split] = [row for row, words in enumerate(texts) if not resembles_an_earlier_one(words)]
        for row in keep[split]:
            for word in rarest(texts[row]):
                earlier[word].append(texts[row])
    return keep


def assign_modules(sizes: dict[str, int]) -> dict[str, str]:
    """Share the modules of one topic among the splits, whole modules only.

    The largest modules come first and each goes where most sentences are missing: with few modules the shares are
    rough.

    Args:
        sizes: number of sentences of each module.

    Returns:
        The split of each module.
    """
    order = sorted(sizes)
    random.Random(SPLIT_SEED).shuffle(order)
    order.sort(key=lambda module: -sizes[module])
    total = sum(sizes.values())
    missing = {split: share * total for split, share in zip(SPLITS, SPLIT_SHARES, strict=True)}
    assigned = {}
    for module in order:
        split = max(SPLITS, key=lambda name: missing[name])
        missing[split] -= sizes[module]
        assigned[module] = split
    return assigned


def _opening(text: str) -> str:
    return " ".join(normalised_words(text)[:OPENING_WORDS])


def _topic_files() -> Iterator[tuple[str, str, Path]]:
    """Yield topic, dotted module name and path of every source file of the topics, tests excluded."""
    library = Path(sysconfig.get_path("stdlib"))
    for topic, modules in TOPIC_MODULES.items():
        for module in modules.split():
            if (library / f"{module}.py").is_file():
                yield topic, module, library / f"{module}.py"
            for path in sorted((library / module).rglob("*.py")):
                parts = path.relative_to(library).with_suffix("").parts
                if not any(part in ("test", "tests", "idle_test") for part in parts):
                    yield topic, ".".join(part for part in parts if part != "__init__"), path


def _docstring_sentences(path: Path) -> Iterator[str]:
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
