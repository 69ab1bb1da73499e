"""Training and evaluation text that every Python installation carries: its docstrings.

The text is gathered from the standard library and from those of a fixed list of packages that
are installed. Source files are parsed with :mod:`ast`; nothing is imported or executed. The
language reference shipped as ``pydoc_data.topics`` is kept out of the training text, so that it
can serve for evaluation.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

STANDARD_LIBRARY = "stdlib"
_NAMES = (
    "stdlib torch numpy scipy pandas matplotlib mpl_toolkits sympy mpmath networkx transformers "
    "datasets huggingface_hub tokenizers safetensors accelerate typer click rich pip setuptools "
    "pkg_resources fsspec jinja2 markupsafe packaging filelock yaml regex tqdm pyarrow dill "
    "multiprocess xxhash httpx httpcore httpx2 httpcore2 anyio idna h11 PIL fontTools pyparsing "
    "kiwisolver contourpy cycler dateutil pygments markdown_it mdurl onnx ml_dtypes psutil "
    "pydantic pluggy _pytest pytest"
)
PACKAGES: tuple[str, ...] = tuple(_NAMES.split())
VALIDATION_PERCENT = 2
LEAK_WORDS = 13
_MIN_DOCUMENT = 120  # characters; shorter documents teach little but where documents end
_HEADING = 32  # a paragraph shorter than this ("Examples::") may recur without being a duplicate
_SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "dist-packages"),
    *("pydoc_data", "_bundled", "node_modules"),
}
_ATTACHERS = {"add_docstr", "add_docstr_all", "add_newdoc", "_add_docstr", "add_newdocs"}
_Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Document:
    """Docstrings of one module or one class, with the package they came from."""

    package: str
    name: str
    text: str

    @property
    def split(self) -> str:
        """``"validation"`` for about 2 % of names, chosen by hash, else ``"train"``."""
        digest = hashlib.sha256(self.name.encode()).digest()
        share = int.from_bytes(digest[:4], "big") % 100
        return "validation" if share < VALIDATION_PERCENT else "train"


def python_docstrings(split: str = "train", packages: Iterable[str] = PACKAGES) -> list[str]:
    """Return the documents of one split, always in the same order on the same installation.

    Args:
        split: ``"train"`` or ``"validation"``.
        packages: Names to gather from; ``"stdlib"`` is the standard library, and names that
            are not installed are passed over.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', not {split!r}")
    return [item.text for item in documents(tuple(packages)) if item.split == split]


def installed() -> str:
    """Return a digest of the interpreter and of what is installed: the same text for the same."""
    found = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    return hashlib.sha256("\n".join([platform.python_version(), *found]).encode()).hexdigest()


@lru_cache(maxsize=4)
def documents(packages: tuple[str, ...] = PACKAGES) -> tuple[Document, ...]:
    """Return every document of both splits, without repeated or held-out paragraphs."""
    held_out = word_runs(held_out_topics())
    seen: set[str] = set()
    found: list[Document] = []
    for package in packages:
        for name, docstrings in _package_documents(package):
            kept = [
                paragraph
                for docstring in docstrings
                for paragraph in _paragraphs(docstring)
                if _is_new(paragraph, seen) and held_out.isdisjoint(word_runs(paragraph))
            ]
            text = "\n\n".join(kept)
            if len(text) >= _MIN_DOCUMENT:
                found.append(Document(package, name, text))
    return tuple(found)


@lru_cache(maxsize=1)
def held_out_topics() -> str:
    """Return the text of ``pydoc_data.topics``, sorted by topic: the held-out evaluation text."""
    source = _standard_library() / "pydoc_data" / "topics.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            topics = ast.literal_eval(node.value)
            if isinstance(topics, dict):
                return "\n\n".join(topics[key].strip() for key in sorted(topics))
    raise ValueError("pydoc_data.topics holds no dictionary of topics")


def word_runs(text: str, length: int = LEAK_WORDS) -> set[tuple[str, ...]]:
    """Return every run of ``length`` consecutive words of a text, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _is_new(paragraph: str, seen: set[str]) -> bool:
    """Tell whether a paragraph has not been met before, white space folded, and remember it."""
    folded = " ".join(paragraph.split())
    if len(folded) < _HEADING:
        return True
    if folded in seen:
        return False
    seen.add(folded)
    return True


def _paragraphs(docstring: str) -> list[str]:
    parts = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return [part.rstrip() for part in parts if part.strip()]


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _source_files(package: str) -> tuple[Path, list[Path]]:
    """Return the folder of a package and its source files, sorted, test folders left out."""
    if package == STANDARD_LIBRARY:
        root = _standard_library()
    else:
        spec = importlib.util.find_spec(package)
        if spec is None:
            return Path(), []
        if not spec.submodule_search_locations:
            if spec.origin is None or not spec.origin.endswith(".py"):
                return Path(), []
            return Path(spec.origin).parent, [Path(spec.origin)]
        root = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for folder, children, names in os.walk(root):
        children[:] = [child for child in children if child not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith((".py", ".pyi"))]
    return root, sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _package_documents(package: str) -> Iterator[tuple[str, list[str]]]:
    root, files = _source_files(package)
    for path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old sources hold invalid escape sequences
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue
        where = f"{package}/{path.relative_to(root).as_posix()}"
        for name, docstrings in _module_documents(tree):
            yield f"{where}:{name}", docstrings


def _module_documents(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield the module with its functions, then each class, then each attached docstring."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    others = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    own = [ast.get_docstring(tree, clean=False) or ""]
    yield "", own + [text for node in others for text in _docstrings(node)]
    for node in classes:
        yield node.name, list(_docstrings(node))
    calls = (node.value for node in others if isinstance(node, ast.Expr))
    for number, call in enumerate(calls):
        if isinstance(call, ast.Call) and _called_name(call) in _ATTACHERS:
            strings = (node.value for node in ast.walk(call) if isinstance(node, ast.Constant))
            # The short strings are names of the things documented, not prose.
            yield str(number), [s for s in strings if isinstance(s, str) and len(s) > 60]


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a definition and of those inside it, in source order."""
    if isinstance(node, _Definition):
        yield ast.get_docstring(node, clean=False) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)


def _called_name(call: ast.Call) -> str:
    function = call.func
    return str(getattr(function, "attr", "") or getattr(function, "id", ""))
