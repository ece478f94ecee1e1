"""The house in numbers: how the modules of the three packages import each other. `python -m tests.house` prints them.

A name that is imported through a door (a package's `__init__.py`) counts as an import of the module that defines it:
a door is a way in, not a floor. Imports inside functions count like those at the top; those for type checkers only
count where importers and cycles are counted.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rl_actors", "serving", "cluster")
LARGEST_FOLDER, ONE_IMPORTER, LONGEST_CHAIN, LONGEST_FILE = 12, 22.0, 12, 500

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `name` is empty for `import module`."""

    module: str
    name: str
    is_for_types: bool


def imports_of(source: str) -> list[Import]:
    """Return the absolute imports of a file, those inside functions too."""
    return list(_imports(ast.parse(source), is_for_types=False))


def _imports(node: ast.AST, *, is_for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, "", is_for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from (Import(child.module, alias.name, is_for_types) for alias in child.names)
        is_type_block = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _imports(child, is_for_types=is_for_types or is_type_block)


def module_name(path: str) -> str:
    """Return the dotted name of a file: `serving/split/__init__.py` is `serving.split`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph(sources: Mapping[str, str], *, with_types: bool) -> Graph:
    """Return module -> modules of ours that it imports, every name followed through doors to where it is defined."""
    modules = {module_name(path): text for path, text in sources.items()}
    doors = {module_name(path) for path in sources if path.endswith("/__init__.py")}
    found = {name: imports_of(text) for name, text in modules.items()}
    exported = {door: {one.name: one.module for one in found[door] if one.name} for door in doors}

    def defining(one: Import) -> str:
        inner = f"{one.module}.{one.name}"
        if one.name and inner in modules:
            return inner
        behind = exported.get(one.module, {}).get(one.name, "")
        return defining(Import(behind, one.name, one.is_for_types)) if behind in modules else one.module

    graph = {}
    for name in modules.keys() - {door for door in doors if _only_opens(modules[door])}:
        kept = (one for one in found[name] if with_types or not one.is_for_types)
        graph[name] = frozenset(defining(one) for one in kept if defining(one) in modules) - {name}
    return graph


def _only_opens(source: str) -> bool:
    """Whether an `__init__.py` only hands names on: a docstring and imports."""
    return all(isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign) for node in ast.parse(source).body)


def one_importer(graph: Graph) -> list[str]:
    """Return the modules that exactly one other module imports."""
    counts = Counter(target for targets in graph.values() for target in targets)
    return sorted(module for module in graph if counts[module] == 1)


def cycles(graph: Graph) -> list[tuple[str, ...]]:
    """Return each import cycle as the modules on it, found depth first."""
    state: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(module: str) -> None:
        state[module] = 1
        stack.append(module)
        for target in sorted(graph.get(module, ())):
            if state.get(target) == 1:
                found.append(tuple(stack[stack.index(target) :]))
            elif target not in state:
                visit(target)
        stack.pop()
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module)
    return found


def longest_chain(graph: Graph) -> tuple[str, ...]:
    """Return the longest chain of imports, importer first. Needs a graph without cycles."""
    known: dict[str, tuple[str, ...]] = {}

    def below(module: str) -> tuple[str, ...]:
        if module not in known:
            chains = (below(target) for target in sorted(graph.get(module, ())))
            known[module] = (module, *max(chains, key=len, default=()))
        return known[module]

    return max((below(module) for module in sorted(graph)), key=len, default=())


def folder_sizes(paths: Iterable[str]) -> Counter[str]:
    """Return folder -> modules in it; its door is not counted."""
    return Counter(path.rpartition("/")[0] for path in paths if not path.endswith("/__init__.py"))


def code_lines(source: str) -> int:
    """Return the lines that are not blank."""
    return sum(1 for line in source.splitlines() if line.strip())


def comment_lines(source: str) -> int:
    """Return the lines that carry a comment; docstrings and tool directives (`noqa`, `type:`, `fmt:`) do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    directives = ("# noqa", "# type:", "# fmt:", "# pyright:", "#!")
    return sum(1 for token in tokens if token.type == tokenize.COMMENT and not token.string.startswith(directives))


def read_sources(*below: str) -> dict[str, str]:
    """Return the text of every Python file by path relative to the repository."""
    files = [path for name in below for path in sorted((ROOT / name).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def lines_of(sources: Mapping[str, str]) -> int:
    """Return all lines, blank ones too, as `wc -l` counts them."""
    return sum(text.count("\n") for text in sources.values())


@dataclass(frozen=True, slots=True)
class Number:
    """One number of the house, its limit in words, and whether it keeps it."""

    name: str
    value: str
    limit: str
    is_kept: bool


def house_numbers() -> list[Number]:
    """Return the numbers of this repository."""
    sources = read_sources(*PACKAGES)
    graph, with_types = import_graph(sources, with_types=False), import_graph(sources, with_types=True)
    (folder, size), *_ = folder_sizes(sources).most_common(1)
    share = 100 * len(one_importer(with_types)) / len(sources)
    loops = cycles(with_types)
    chain = () if loops else longest_chain(graph)
    height, longest = max((text.count("\n"), path) for path, text in sources.items())
    tests = lines_of(read_sources("tests")) / lines_of(sources)
    comments = 100 * sum(map(comment_lines, sources.values())) / sum(map(code_lines, sources.values()))
    return [
        Number("source lines", f"{lines_of(sources):,} in {len(sources)} modules", "", is_kept=True),
        Number("test lines a source line", f"{tests:.2f}", ">= 1.4", tests >= 1.4),
        Number("comments per 100 code lines", f"{comments:.1f}", ">= 4", comments >= 4),
        Number("largest folder", f"{size} modules ({folder})", f"<= {LARGEST_FOLDER}", size <= LARGEST_FOLDER),
        Number(
            "modules with one importer",
            f"{share:.1f} %",
            f"<= {ONE_IMPORTER:g} %",
            share <= ONE_IMPORTER,
        ),
        Number("import cycles", str(len(loops)), "0", not loops),
        Number(
            "longest import chain",
            f"{len(chain)} ({' > '.join(chain)})",
            f"<= {LONGEST_CHAIN}",
            bool(chain) and len(chain) <= LONGEST_CHAIN,
        ),
        Number("longest file", f"{height} lines ({longest})", f"<= {LONGEST_FILE}", height <= LONGEST_FILE),
    ]


def main() -> int:
    """Print every number with its limit; 1 when one is not kept."""
    numbers = house_numbers()
    for number in numbers:
        mark = "ok" if number.is_kept else "NO"
        sys.stdout.write(f"{mark}  {number.name}: {number.value}{f'; limit {number.limit}' if number.limit else ''}\n")
    return 0 if all(number.is_kept for number in numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
