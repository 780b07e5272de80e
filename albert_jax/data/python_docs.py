"""The English prose in the documentation of the installed Python packages.

In:  the `*.py` files of the environment's packages, parsed with `ast`; nothing is imported or run.
Out: one document a module: the paragraphs of its docstrings, in order.

What is no prose is left out: code and doctests, tables, signatures, names and types of parameter
lists (in NumPy's, Google's and Sphinx's style; descriptions that read as sentences stay),
directives, licences, and every paragraph that an earlier module has already. Test folders and this
package are not read.

Same packages, same documents, in the order of their paths.
"""

import ast
import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_SKIPPED_FOLDERS = frozenset(
    {"albert_jax", "tests", "test", "testing", "_vendor", "__pycache__", "node_modules"}
)
_LARGEST_MODULE = 1 << 20  # bytes; larger ones are generated tables
_LEAST_SHARE = 0.4  # of a module's bytes between triple quotes; one with less is not parsed
_LEAST_WORDS = 8  # of a paragraph
_LEAST_WORDS_OF_ITEM = 15  # of the description of a parameter, or an entry of a list

_TRIPLE_QUOTED = re.compile(
    rb'"""[^"\\]*(?:(?:"(?!"")|\\.)[^"\\]*)*"""' rb"|'''[^'\\]*(?:(?:'(?!'')|\\.)[^'\\]*)*'''",
    re.DOTALL,
)

# Headings of parameter lists and the like; what stands under them is looked at line by line anyway.
_HEADING = re.compile(r"^[A-Z][\w /&-]{0,40}:?$")
_UNDERLINE = re.compile(r"^([-=~^*#+\"'`])\1{2,}$")
_LIST_ITEM = re.compile(r"^(?:[-*+\u2022]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
# `name: `, `name (type): `, `*args: `, `:param name: `, `:returns: ` in front of a description.
_PARAMETER = re.compile(
    r"^(?::\w+[^:\n]*:|\*{0,2}`*[\w.,\[\]*-]+`*(?:\s*\([^)\n]*\))?\s*:(?=\s|$))\s*"
)
# `name : type` on a line of its own, the description indented below it.
_NUMPY_PARAMETER = re.compile(r"^(\*{0,2}[\w.]+)(?:, \*{0,2}[\w.]+)* : .*$")
_DROPPED_DIRECTIVE = re.compile(
    r"^\.\. +(?!(?:note|warning|tip|important|caution|hint|attention|danger)::)"
)
_KEPT_DIRECTIVE = re.compile(r"^\.\. +[a-z]+::\s*")

_SPOKEN_LABELS = ("Note:", "NOTE:", "Notes:", "Warning:", "Example:", "Important:")

_ROLE = re.compile(r":[\w:+.-]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{0,2}")
_MARKDOWN_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_CITATION = re.compile(r"\s*\[[#*\w]{1,12}\]_|\s*\|\w+\||(?<=\w)_{1,2}(?=[\s.,;:)]|$)")
_MARKUP = re.compile(r"`+|\*\*|(?<!\w)\*(?=\w)|(?<=[\w.,])\*(?!\w)")
_QUALIFIER = re.compile(r"^(?:\w+\.)+(?=\w+$)")

_WORD = re.compile(
    r"^[\"'(\u201c\u2018]*[A-Za-z]+(?:['\u2019-][A-Za-z]+)*[\"')\u201d\u2019]*[.,;:!?]*[\"')]*$"
)
_SENTENCE_END = re.compile(r"[.!?][\"')]*$")
_FUNCTION_WORDS = frozenset(
    ("the", "a", "an", "of", "to", "is", "are", "in", "and", "for", "if", "be", "with", "by", "on")
)
_LICENCE = re.compile(
    r"copyright|licen[cs]ed? |warrant(?:y|ies)|all rights reserved", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Module:
    """A Python file of an installed package: its path below the packages' folder, and bytes."""

    root: str
    path: str
    size: int


@dataclasses.dataclass(frozen=True)
class Extract:
    """The paragraphs of a module, or why there are none."""

    module: Module
    paragraphs: list[str]
    skipped: str


def find_modules() -> list[Module]:
    """The Python files of the environment's packages, but for tests, in the order of paths."""
    roots = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    found = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
            for name in names:
                if (
                    name.endswith(".py")
                    and not name.startswith("test_")
                    and not name.endswith("_test.py")
                ):
                    path = Path(folder) / name
                    relative = str(path.relative_to(root))
                    found[relative] = Module(root, relative, path.stat().st_size)
    return [found[path] for path in sorted(found)]


def extract(module: Module) -> Extract:
    """The prose of one module's docstrings; a file that cannot be parsed has none."""
    if module.size > _LARGEST_MODULE:
        return Extract(module, [], "modules of over 1 MiB, taken for generated")
    try:
        source = (Path(module.root) / module.path).read_bytes()
    except OSError:
        return Extract(module, [], "modules that cannot be read")
    # Parsing is what takes the time; modules of much code and little prose take most of it.
    if sum(map(len, _TRIPLE_QUOTED.findall(source))) < _LEAST_SHARE * len(source):
        return Extract(module, [], "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Extract(module, [], "modules that do not parse")
    found = [paragraph for docstring in _docstrings(tree) for paragraph in prose(docstring)]
    return Extract(module, found, "")


def write(path: Path, extracts: Iterable[Extract]) -> dict[str, Any]:
    """Writes JSON Lines, an object a module with `module` and `text`; a paragraph that occurred
    before is left out.

    Args:
        path: the file to write.
        extracts: in the order of `find_modules`.

    Returns:
        For the manifest: the packages with their versions, and what was skipped.
    """
    seen: set[bytes] = set()
    skipped: collections.Counter[str] = collections.Counter()
    with path.open("w", encoding="utf-8") as file:
        for item in extracts:
            if item.skipped:
                skipped[item.skipped] += 1
            fresh = []
            for paragraph in item.paragraphs:
                digest = hashlib.blake2b(paragraph.lower().encode(), digest_size=8).digest()
                if digest in seen:
                    skipped["paragraphs that an earlier one repeats"] += 1
                else:
                    seen.add(digest)
                    fresh.append(paragraph)
            if fresh:
                record = {"module": item.module.path, "text": "\n\n".join(fresh)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {"packages": dict(sorted(packages.items())), "skipped": dict(skipped)}


def prose(docstring: str) -> list[str]:
    """The paragraphs of a docstring, taken without its indentation, that are English prose."""
    return [
        text for text in map(_clean, _blocks(docstring.expandtabs().split("\n"))) if _is_prose(text)
    ]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, in the order of the file."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Definitions stand in statements, never in expressions.
        stack.extend(
            child
            for child in reversed(list(ast.iter_child_nodes(node)))
            if isinstance(child, ast.stmt)
        )


def _blocks(lines: list[str]) -> Iterator[str]:
    """Stretches of lines that belong together, joined; no code, tables, directives, headings."""
    block: list[str] = []
    block_indent = 0
    skip_deeper_than = (
        -1
    )  # while >= 0: a code block or dropped directive, to the end of its indentation
    in_doctest = fenced = False
    for index, raw in enumerate(lines):
        line = raw.strip()
        indent = len(raw) - len(raw.lstrip())
        if line.startswith(("```", "~~~")):
            fenced = not fenced
        if not line or fenced or line.startswith(("```", "~~~")):
            yield from _joined(block)
            block = []
            in_doctest = in_doctest and bool(line)
            continue
        if skip_deeper_than >= 0:
            if indent > skip_deeper_than:
                continue
            skip_deeper_than = -1
        in_doctest = in_doctest or line.startswith((">>>", "In ["))
        if in_doctest:
            continue
        following = lines[index + 1].strip() if index + 1 < len(lines) else ""
        if _UNDERLINE.match(line) or (_UNDERLINE.match(following) and _HEADING.match(line)):
            yield from _joined(block)
            block = []
            continue
        if _DROPPED_DIRECTIVE.match(line):
            yield from _joined(block)
            block, skip_deeper_than = [], indent
            continue
        starts_item = bool(_LIST_ITEM.match(line)) or (
            bool(_PARAMETER.match(line)) and (not block or indent <= block_indent)
        )
        if block and (
            starts_item or indent < block_indent or (indent > block_indent and len(block) > 1)
        ):
            yield from _joined(block)
            block = []
        if not block:
            block_indent = indent
        elif len(block) == 1:
            block_indent = max(indent, block_indent) if _is_item(block[0]) else block_indent
        # Of NumPy's lines only the name is needed, to know the description for one.
        block.append(_NUMPY_PARAMETER.sub(r"\1:", line))
        if line.endswith("::"):
            yield from _joined(block)
            block, skip_deeper_than = [], indent
    yield from _joined(block)


def _is_item(line: str) -> bool:
    return bool(_LIST_ITEM.match(line) or _PARAMETER.match(line))


def _joined(block: list[str]) -> Iterator[str]:
    """The text of a block without list mark or parameter name; no short entries of lists."""
    text = _KEPT_DIRECTIVE.sub("", " ".join(block), count=1)
    # "Note: …" is a sentence, "name: …" a parameter.
    if not _is_item(text) or text.startswith(_SPOKEN_LABELS):
        yield text
    elif text.count(" ") >= _LEAST_WORDS_OF_ITEM:
        yield _PARAMETER.sub("", _LIST_ITEM.sub("", text, count=1), count=1)


def _clean(text: str) -> str:
    text = _ROLE.sub(lambda match: _QUALIFIER.sub("", match[1]), text)
    text = _LINK.sub(r"\1", text)
    text = _MARKDOWN_LINK.sub(r"\1", text)
    text = _CITATION.sub("", text)
    text = _MARKUP.sub("", text)
    return " ".join(text.replace("::", ":").split())


def _is_prose(text: str) -> bool:
    """Whether this begins with a capital, ends with a full stop, and is made of English words."""
    if not (text[:1].isupper() and text.isprintable() and _SENTENCE_END.search(text)):
        return False
    tokens = text.split()
    if len(tokens) < _LEAST_WORDS or _LICENCE.search(text):
        return False
    words = sum(1 for token in tokens if _WORD.match(token))
    return words >= 0.75 * len(tokens) and any(token.lower() in _FUNCTION_WORDS for token in tokens)
