"""The house style as functions: each rule takes a file and yields what is wrong with it.

A `Source` is one file of the project with its path relative to the root, so that a rule can be
shown a planted violation under any name. Rules read the syntax tree, never import the file.
"""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("layout", "cluster", "checkpoint", "runtime", "launch")  # each may import those before
CODE_FOLDERS = (*PACKAGES, "examples", "benchmarks", "tests")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".html", ".lock", ".sh", ".txt", ".cfg"}

FILE_LINES, FUNCTION_LINES, CLASS_LINES = 500, 60, 250
PARAMETERS, METHODS, COLUMNS, PRODUCT_LINES = 7, 15, 100, 20_300

BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
PURE_IMPORTS = {
    "dataclasses", "enum", "typing", "collections", "bisect", "math", "hashlib", "hmac", "json",
    "itertools", "functools", "contextlib", "re", "numpy", "xxhash",
}  # fmt: skip
ENTRY_POINTS = {"launch/cli.py", "runtime/run.py"}  # where a process may catch everything
ENVIRONMENT_FILE = "cluster/environment.py"
# Directories of somebody's machine; the project is read on others.
FOREIGN_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file at `path`, taken for the project's `name` (relative, with forward slashes)."""

    path: Path
    name: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @property
    def package(self) -> str:
        return self.name.split("/")[0]

    @property
    def module(self) -> str:
        parts = ["outlast", *self.name.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def classes(self) -> Iterator[ast.ClassDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))


Rule = Callable[[Source], Iterator[str]]


def project_files(root: Path = ROOT) -> list[Source]:
    """Every text file of the project: the folders of the product, the tests, the book, the root."""
    found = [path for path in root.iterdir() if path.is_file()]
    for folder in (*CODE_FOLDERS, "docs", ".ci"):
        found += (path for path in (root / folder).rglob("*") if path.is_file())
    names = {path: path.relative_to(root).as_posix() for path in found}
    return [
        Source(path, names[path])
        for path in sorted(found)
        if "__pycache__" not in path.parts
        and (path.suffix in TEXT_SUFFIXES or path.name in ("Makefile", "run"))
    ]


def python_files(root: Path = ROOT) -> list[Source]:
    return [source for source in project_files(root) if source.path.suffix == ".py"]


def product_lines(sources: list[Source]) -> int:
    """Lines of code of the product: without blank lines, comments and docstrings, which explain."""
    product = [s for s in sources if s.name.split("/")[0] in PACKAGES or "/" not in s.name]
    return sum(len(_code_lines(source)) for source in product)


def _code_lines(source: Source) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    explained: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            explained |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.text.splitlines(), 1)
    code = {n for n, line in lines if line.strip() and not line.lstrip().startswith("#")}
    return code - explained


def pure_modules(project: Path = ROOT / "pyproject.toml") -> tuple[str, ...]:
    """Names (of modules, or of packages that are pure as a whole) from the list that mypy reads."""
    mypy = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["mypy"]
    return (*mypy["packages"], *mypy["modules"])


def is_pure(module: str, pure: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in pure)


# ---- shape


def file_budget(source: Source) -> Iterator[str]:
    lines = source.text.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{len(lines)} lines, at most {FILE_LINES}"
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield f"line {number}: {len(line)} columns, at most {COLUMNS}"


def _length(node: Function | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def function_budget(source: Source) -> Iterator[str]:
    for node in source.functions():
        if _length(node) > FUNCTION_LINES:
            yield f"{node.name}: {_length(node)} lines, at most {FUNCTION_LINES}"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        named = [a for a in arguments if a.arg not in ("self", "cls")]
        if len(named) > PARAMETERS:
            yield f"{node.name}: {len(named)} parameters, at most {PARAMETERS}"


def class_budget(source: Source) -> Iterator[str]:
    for node in source.classes():
        if _length(node) > CLASS_LINES:
            yield f"{node.name}: {_length(node)} lines, at most {CLASS_LINES}"
        methods = sum(isinstance(child, Function) for child in node.body)
        if methods > METHODS:
            yield f"{node.name}: {methods} methods, at most {METHODS}"


def file_name(source: Source) -> Iterator[str]:
    if source.path.stem in BANNED_NAMES:
        yield f"a file is named after its noun, not {source.path.name}"


# ---- imports


def _imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of all imported modules; a relative import is shown with its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def _at_import(tree: ast.Module) -> Iterator[str]:
    """Modules imported when the file itself is: not inside functions or `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        waiting += ast.iter_child_nodes(node)


def import_order(source: Source) -> Iterator[str]:
    """layout < cluster < checkpoint < runtime < launch; absolute imports; launch without torch."""
    if source.package not in PACKAGES:
        return
    allowed = PACKAGES[: PACKAGES.index(source.package) + 1]
    for name in _imports(source.tree):
        parts = name.split(".")
        if name.startswith("."):
            yield f"relative import {name}"
        elif parts[0] == "outlast" and len(parts) > 1 and parts[1] not in allowed:
            yield f"{source.package} may not import {name}"
    if source.package != "runtime":
        for name in _at_import(source.tree):
            if name.split(".")[0] == "torch" or name.startswith("outlast.runtime"):
                yield f"imports {name} when it is imported itself"


def purity(source: Source, pure: tuple[str, ...] | None = None) -> Iterator[str]:
    """A pure module imports pure modules and a few modules without effects, nothing else."""
    pure = pure_modules() if pure is None else pure
    if not is_pure(source.module, pure):
        return
    for name in _imports(source.tree):
        if name.split(".")[0] not in PURE_IMPORTS and not is_pure(name, pure):
            yield f"pure module imports {name}"


# ---- safety


def broad_except(source: Source) -> Iterator[str]:
    if source.name in ENTRY_POINTS or source.package not in (*PACKAGES, "examples"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if not caught or re.search(r"\b(Base)?Exception\b", caught):
                yield f"line {node.lineno}: except {caught or 'without a type'}"


def unsafe_load(source: Source) -> Iterator[str]:
    """Bytes from a disk or a socket never run code."""
    for name in _imports(source.tree):
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"):
            yield f"imports {name}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
        if call in ("eval", "exec"):
            yield f"line {node.lineno}: {call}()"
        if call.endswith(("pickle.load", "pickle.loads", "Unpickler")):
            yield f"line {node.lineno}: {call}()"
        if call == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if call in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: {call} with allow_pickle"


def environment_reads(source: Source) -> Iterator[str]:
    """The environment is read in one file; everything else is passed what it needs."""
    if source.package not in PACKAGES or source.name == ENVIRONMENT_FILE:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names} & {"environ", "environb", "getenv"}
            yield from (f"line {node.lineno}: from os import {name}" for name in sorted(names))


def own_words(source: Source) -> Iterator[str]:
    """The project speaks of itself alone: no paths of a build machine, no package hosts."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if FOREIGN_PATH.search(line):
            yield f"line {number}: path of a machine"
    if source.name.endswith(".lock"):
        for number, line in enumerate(source.text.splitlines(), 1):
            if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line):
                yield f"line {number}: {line!r} is not name==version"


PYTHON_RULES: tuple[Rule, ...] = (
    file_budget, function_budget, class_budget, file_name, import_order, purity, broad_except,
    unsafe_load, environment_reads,
)  # fmt: skip
TEXT_RULES: tuple[Rule, ...] = (own_words,)
