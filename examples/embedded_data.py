# SPDX-License-Identifier: Apache-2.0
"""Data without a network: scikit-learn's digits, and sentences of the docstrings of Python's standard library."""

import ast
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0
SPLITS = ("train", "validation", "test")
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
    parts = {"train": train, "validation": validation, "test": test}
    return DatasetDict({split: rows.select(part) for split, part in parts.items()})


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


def load_bags(size: int | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Load which words each docstring sentence has, of all or of the `size` commonest, and its topic."""
    splits = load_docstring_sentences()
    vectorizer = CountVectorizer(binary=True, min_df=2, dtype=np.uint8).fit(splits["train"]["text"][:])
    bags = {name: vectorizer.transform(splits[name]["text"][:]).toarray() for name in SPLITS}
    common = np.sort(np.argsort(-bags["train"].sum(0, dtype=int), kind="stable")[:size])
    return {name: (bags[name][:, common], np.array(splits[name]["label"][:])) for name in SPLITS}


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
            for path in [*library.glob(f"{module}.py"), *sorted(library.glob(f"{module}/**/*.py"))]:
                parts = path.relative_to(library).with_suffix("").parts
                if not {"test", "tests", "idle_test"} & set(parts):
                    yield topic, ".".join(part for part in parts if part != "__init__"), path


def docstring_sentences(path: Path) -> Iterator[str]:
    """Yield the sentences of a source file's docstrings, in the order of the file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                if not paragraph.lstrip().startswith(">>>"):
                    yield from re.split(r"(?<=[.!?])\s+", paragraph)
