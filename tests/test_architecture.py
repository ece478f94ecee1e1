"""The numbers and borders of the house style, kept by a machine. Every check is a function with a negative control."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.house import (
    PACKAGES,
    ROOT,
    code_lines,
    comment_lines,
    cycles,
    folder_sizes,
    import_graph,
    imports_of,
    longest_chain,
    module_name,
    one_importer,
    read_sources,
)

TOP_LEVEL = {
    "pyproject.toml", "cluster", "rl_actors", "serving", "tests", "ray_cluster.yaml", "README.md", "Makefile",
    "CHANGELOG.md", "benchmarks", "docs", "requirements", "LICENSE",
}  # fmt: skip
# Left by tools on a working tree; never committed.
TOOL_LEFTOVERS = {"build", "dist", "__pycache__"}

FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_CAP = 12, 35, 60
FILE_MEDIAN, FILE_CAP = 150, 500
MAX_NESTING = 3
COMMENTS_PER_100 = (4.0, 10.0)
PIPELINE_CAP = 160
TEST_LINES_PER_LINE = {"rl_actors": 1.0, "serving": 2.0, "cluster": 1.0}
FORBIDDEN_WORDS = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "base", "misc"}

# Outside worlds and the only files that may import them. One adapter per world keeps the rest testable without it.
ADAPTERS: Mapping[str, tuple[str, ...]] = {
    "mlflow": ("cluster/registry/*",),
    "vllm": ("rl_actors/actors/*",),
    "deepspeed": ("rl_actors/learner/*", "rl_actors/actors/*"),
    "sqlite3": ("serving/store/*", "serving/split/*", "cluster/workflows/*"),
    "ray": ("rl_actors/actors/*", "serving/platform/*", "cluster/ray_cluster/*", "cluster/plan/placement.py"),
}
SERVE_CALLS = ("serve.run", "serve.start", "serve.delete", "serve.shutdown")
SERVE_ADAPTER = "serving/platform/serve.py"

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- the checks: source text in, findings or numbers out ------------------------------------------


def functions(source: str) -> list[Function]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]


def body_lines(function: Function) -> int:
    """Lines of a function, without its docstring, decorators and blank lines: what a reader has to follow."""
    first = function.body[0]
    has_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def function_lengths(source: str) -> dict[str, int]:
    return {f"{node.name}:{node.lineno}": body_lines(node) for node in functions(source)}


_NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def nesting(function: Function) -> int:
    """Deepest block inside a function; `elif` is on the level of its `if`, an inner function starts from zero."""

    def depth(node: ast.AST, level: int) -> int:
        deepest = level
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef):
                continue
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            deeper = isinstance(child, _NESTING) and not is_elif
            deepest = max(deepest, depth(child, level + deeper))
        return deepest

    return depth(function, 0)


def too_deep(source: str, cap: int = MAX_NESTING) -> list[str]:
    return [f"{f.name}:{f.lineno} nests {nesting(f)} deep" for f in functions(source) if nesting(f) > cap]


def untyped(source: str) -> list[str]:
    """Parameters and returns without an annotation; `self` and `cls` need none."""
    found = []
    for function in functions(source):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
        missing = [a.arg for a in named if a.annotation is None and a.arg not in {"self", "cls"}]
        if function.returns is None:
            missing.append("return")
        found += [f"{function.name}:{function.lineno} {name}" for name in missing]
    return found


def explanation_lines(source: str) -> int:
    """Docstring lines below the summary: the summary says what, the rest says why, in which units, after whom."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return sum(max(0, code_lines(text) - 1) for text in texts)


def imported_modules(source: str) -> set[str]:
    """Modules imported at run time anywhere in a file; imports for type checkers only do not count."""
    modules: set[str] = set()
    for node in _run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    return modules


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield from _run_time_nodes(child)


def imports_outside_adapters(source: str, path: str, adapters: Mapping[str, tuple[str, ...]] = ADAPTERS) -> list[str]:
    worlds = {module.partition(".")[0] for module in imported_modules(source)} & adapters.keys()
    allowed = {world for world in worlds if any(fnmatch(path, pattern) for pattern in adapters[world])}
    return [f"{path} imports {world}; only {', '.join(adapters[world])} may" for world in sorted(worlds - allowed)]


def serve_calls(source: str) -> list[str]:
    """Calls that deploy or delete on Ray Serve, however the module is called (`serve.run`, `ray.serve.run`)."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = ((ast.unparse(call.func), call.lineno) for call in calls)
    return [f"line {line}: {name}" for name, line in names if name.removeprefix("ray.") in SERVE_CALLS]


def forbidden_names(path: str) -> list[str]:
    words = [word for part in Path(path).with_suffix("").parts for word in part.split("_")]
    return [word for word in words if word in FORBIDDEN_WORDS]


def percentile(values: list[int], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# --- the tree -------------------------------------------------------------------------------------


SOURCES = read_sources(*PACKAGES)
EACH_FILE = pytest.mark.parametrize("path", sorted(SOURCES))


@EACH_FILE
def test_functions_are_short(path: str):
    long = {name: lines for name, lines in function_lengths(SOURCES[path]).items() if lines > FUNCTION_CAP}
    assert not long, f"{path}: longer than {FUNCTION_CAP} lines: {long}"


@EACH_FILE
def test_blocks_are_not_deep(path: str):
    assert not too_deep(SOURCES[path]), path


@EACH_FILE
def test_everything_is_typed(path: str):
    assert not untyped(SOURCES[path]), path


@EACH_FILE
def test_files_are_short(path: str):
    lines = len(SOURCES[path].splitlines())
    assert lines <= FILE_CAP, f"{path}: {lines} lines, cap {FILE_CAP}"


@EACH_FILE
def test_outside_worlds_are_reached_through_their_adapter(path: str):
    assert not imports_outside_adapters(SOURCES[path], path)


@EACH_FILE
def test_only_the_platform_deploys_on_ray_serve(path: str):
    assert path == SERVE_ADAPTER or not serve_calls(SOURCES[path]), path


@EACH_FILE
def test_a_file_is_named_for_what_it_does(path: str):
    assert not forbidden_names(path), path


def test_the_typical_function_is_short():
    lengths = {f"{path}:{name}": n for path, text in SOURCES.items() for name, n in function_lengths(text).items()}
    longest = sorted(lengths.items(), key=lambda item: -item[1])[:10]
    assert statistics.median(lengths.values()) <= FUNCTION_MEDIAN, longest
    assert percentile(list(lengths.values()), 0.9) <= FUNCTION_P90, longest


def test_the_typical_file_is_short():
    lines = {path: len(text.splitlines()) for path, text in SOURCES.items() if text.count("\n") > 1}
    assert statistics.median(lines.values()) <= FILE_MEDIAN, sorted(lines.items(), key=lambda item: -item[1])[:10]


def test_the_tree_explains_itself_but_does_not_chatter():
    """Comments, and docstring lines below the summary, per 100 lines of the whole tree."""
    low, high = COMMENTS_PER_100
    prose = {path: comment_lines(text) + explanation_lines(text) for path, text in SOURCES.items()}
    lines = {path: code_lines(text) for path, text in SOURCES.items()}
    overall = 100 * sum(prose.values()) / sum(lines.values())
    ranked = sorted((round(100 * prose[path] / lines[path], 1), path) for path in SOURCES if lines[path] > 20)
    assert low <= overall <= high, f"{overall:.1f} per 100 lines; least {ranked[:5]}, most {ranked[-5:]}"


@EACH_FILE
def test_no_file_is_more_comment_than_its_limit(path: str):
    comments, lines = comment_lines(SOURCES[path]), code_lines(SOURCES[path])
    assert comments <= max(3, lines * COMMENTS_PER_100[1] / 100), f"{path}: {comments} comments in {lines} lines"


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_enough_tests(package: str):
    source = sum(code_lines(text) for path, text in SOURCES.items() if path.startswith(package))
    tests = sum(code_lines(text) for text in read_sources(f"tests/{package}").values())
    wanted = TEST_LINES_PER_LINE[package] * source
    assert tests >= wanted, f"tests/{package}: {tests} lines for {source} of source, {wanted:.0f} wanted"


def test_the_pipeline_is_one_page():
    assert "cluster/pipeline/story.py" in SOURCES
    lines = len(SOURCES["cluster/pipeline/story.py"].splitlines())
    assert lines <= PIPELINE_CAP, f"cluster/pipeline/story.py: {lines} lines, cap {PIPELINE_CAP}"


def test_the_top_level_is_fixed():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    extra = {name for name in found - TOP_LEVEL - TOOL_LEFTOVERS if not name.endswith(".egg-info")}
    assert not extra, f"unexpected at the top level: {sorted(extra)}"


# --- negative controls: each check must fire ------------------------------------------------------


def test_a_long_function_is_seen():
    source = "def f():\n    '''Doc\n    doc.'''\n" + "    x = 1\n" * 61
    assert function_lengths(source) == {"f:1": 62}
    assert function_lengths("async def g(): ...") == {"g:1": 1}


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        ("if a:\n  for b in c:\n   while d:\n    with e: pass", 4),
        ("try:\n  if a:\n   match b:\n    case 1:\n     if c: pass\nexcept E: pass", 4),
        ("if a: pass\nelif b: pass\nelif c: pass\nelif d: pass\nelif e: pass", 1),
        ("if a: pass\nelse:\n  if b: pass\n  x()", 2),
        ("def inner():\n  if a:\n   if b: pass", 0),
        ("x = [a for a in b for c in d if e]", 0),
    ],
)
def test_nesting_is_counted(body: str, depth: int):
    indented = "\n".join(f" {line}" for line in body.splitlines())
    source = f"def f():\n{indented}\n"
    assert nesting(functions(source)[0]) == depth
    assert bool(too_deep(source)) == (depth > MAX_NESTING)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("def f(a, b: int): pass", ["f:1 a", "f:1 return"]),
        ("def f(*args, **kwargs) -> None: pass", ["f:1 args", "f:1 kwargs"]),
        ("def f(a: int, /, *, b) -> None: pass", ["f:1 b"]),
        ("class A:\n def f(self, x): pass", ["f:2 x", "f:2 return"]),
        ("class A:\n @classmethod\n def f(cls, x: int) -> int: pass", []),
    ],
)
def test_a_missing_type_is_seen(source: str, missing: list[str]):
    assert untyped(source) == missing


@pytest.mark.parametrize(
    ("source", "path", "fires"),
    [
        ("import mlflow", "cluster/pipeline/story.py", True),
        ("from mlflow.tracking import x", "serving/gates/gates.py", True),
        ("import mlflow", "cluster/registry/registry.py", False),
        ("def f():\n    import ray", "rl_actors/algorithms/losses.py", True),
        ("from ray import serve", "serving/gates/gates.py", True),
        ("import ray", "rl_actors/actors/rollout_worker.py", False),
        ("import ray.train as t", "rl_actors/training/ppo.py", True),
        ("if TYPE_CHECKING:\n    import ray", "serving/gates/gates.py", False),
        ("if typing.TYPE_CHECKING:\n    import ray\nelse:\n    pass", "serving/gates/gates.py", False),
        ("import raystack, numpy", "serving/gates/gates.py", False),
        ("from vllm import LLM", "rl_actors/training/ppo.py", True),
        ("from . import ray", "serving/gates/gates.py", False),
    ],
)
def test_an_import_outside_its_adapter_is_seen(source: str, path: str, fires: bool):
    assert bool(imports_outside_adapters(source, path)) == fires


@pytest.mark.parametrize(
    ("source", "fires"),
    [
        ("serve.run(app)", True),
        ("ray.serve.delete('a')", True),
        ("def f():\n    return serve.start(http_options={})", True),
        ("serve.get_app_handle('a')", False),
        ("serve.status()", False),
        ("server.run(app)", False),
        ("'serve.run(app)'", False),
    ],
)
def test_a_serve_call_is_seen(source: str, fires: bool):
    assert bool(serve_calls(source)) == fires


@pytest.mark.parametrize(
    "path", ["serving/utils.py", "cluster/run_manager.py", "rl_actors/common/x.py", "cluster/base.py"]
)
def test_a_forbidden_name_is_seen(path: str):
    assert forbidden_names(path)


def test_a_good_name_passes():
    assert not forbidden_names("rl_actors/models/database.py")


def test_comments_are_counted_without_docstrings_and_directives():
    source = '"""Doc # not one."""\nx = 1  # why\n# alone\ny = "# no"\nz = 2  # noqa: E501\n'
    assert comment_lines(source) == 2
    assert explanation_lines(source) == 0
    assert explanation_lines('def f():\n    """What.\n\n    Why.\n    Unit.\n    """\n') == 2


def test_percentiles_of_short_lists():
    assert percentile([1], 0.9) == 1
    assert percentile(list(range(10)), 0.9) == 9
    assert percentile(list(range(100)), 0.5) == 50


LAYERS: Mapping[str, Callable[[str], bool]] = {
    "rl_actors": lambda module: module.partition(".")[0] in {"serving", "cluster"},
    "serving": lambda module: module.partition(".")[0] == "cluster",
    "cluster": lambda _module: False,
}


def upward_imports(source: str, path: str) -> list[str]:
    """Imports against the direction cluster -> serving -> rl_actors, also those inside functions and for types."""
    climbs = LAYERS[path.partition("/")[0]]
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    return sorted(filter(climbs, names))


@EACH_FILE
def test_imports_go_one_way(path: str):
    assert not upward_imports(SOURCES[path], path), path


@pytest.mark.parametrize(
    ("source", "path", "found"),
    [
        ("import cluster.spec.spec", "serving/gates/gates.py", ["cluster.spec.spec"]),
        ("def f():\n    from serving import gates", "rl_actors/evaluation/suites.py", ["serving"]),
        ("import rl_actors", "cluster/cli/app.py", []),
        ("from rl_actors import errors", "serving/gates/gates.py", []),
        ("import clusters", "rl_actors/contracts/errors.py", []),
    ],
)
def test_an_upward_import_is_seen(source: str, path: str, found: list[str]):
    assert upward_imports(source, path) == found


# A module, what breaks it, and the contract that must say so: upward, sideways, and around an adapter.
BROKEN_CONTRACTS = {
    "serving/gates/cost.py": ("import cluster.spec", "cluster runs, serving releases"),
    "rl_actors/models/sinks.py": ("import rl_actors.training", "rooms of rl_actors"),
    "rl_actors/evaluation/suites.py": ("import rl_actors.agent", "rooms of rl_actors"),
    "serving/store/ledger.py": ("import serving.release", "rooms of serving"),
    "serving/gateway/http.py": ("import serving.release", "rooms of serving"),
    "cluster/records/audit.py": ("import cluster.pipeline", "rooms of cluster"),
    "cluster/service/gateway.py": ("import cluster.pipeline", "rooms of cluster"),
    "cluster/attic.py": ("", "rooms of cluster"),
    "rl_actors/algorithms/losses.py": ("import ray", "algorithms are pure"),
    "rl_actors/training/ppo.py": ("from vllm import LLM", "training works over protocols"),
    "cluster/reports/brief.py": ("import mlflow", "only the registry speaks to MLflow"),
}


def lint_imports(folder: Path, changes: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run this repository's own import contracts over a copy of its rooms, all of them empty but for `changes`."""
    rooms = {path.rpartition("/")[0] for path in SOURCES}
    doors = {f"{room}/__init__.py": "" for room in rooms if room.count("/") <= 1} | {"rl_actors/ports.py": ""}
    for name, text in (doors | dict(changes)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    environ = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_the_import_contracts_hold_where_nothing_is_wrong(tmp_path: Path):
    done = lint_imports(tmp_path, {"cluster/cli/app.py": "import serving.gates, rl_actors.contracts, cluster.spec"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", sorted(BROKEN_CONTRACTS))
def test_each_import_contract_fires(tmp_path: Path, path: str):
    text, contract = BROKEN_CONTRACTS[path]
    done = lint_imports(tmp_path, {path: text})
    assert done.returncode == 1, done.stdout + done.stderr
    if text:  # a room outside the drawing is refused before any contract is read
        broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
        assert len(broken) == 1
        assert broken[0].startswith(contract)


def past_the_door(source: str, path: str) -> list[str]:
    """Imports of what lies inside another room; a room's names are had from its `__init__.py`."""
    own = path.split("/")[:2]
    parts = [(one.module.split("."), one.module) for one in imports_of(source)]
    return sorted({name for steps, name in parts if steps[0] in PACKAGES and len(steps) > 2 and steps[:2] != own})


@pytest.mark.parametrize("path", sorted([*SOURCES, *read_sources("benchmarks")]))
def test_a_room_is_entered_through_its_door(path: str):
    assert not past_the_door((ROOT / path).read_text(encoding="utf-8"), path), path


@pytest.mark.parametrize(
    ("source", "path", "found"),
    [
        ("from cluster.spec.sections import X", "cluster/plan/memory.py", ["cluster.spec.sections"]),
        ("def f():\n    import serving.store.ledger", "cluster/cli/app.py", ["serving.store.ledger"]),
        ("from rl_actors.agent.loop import x", "benchmarks/x.py", ["rl_actors.agent.loop"]),
        ("from cluster.spec.sections import X\nfrom cluster.plan import Y", "cluster/spec/knobs.py", []),
        ("import torch.nn.functional", "cluster/plan/memory.py", []),
    ],
)
def test_a_way_around_the_door_is_seen(source: str, path: str, found: list[str]):
    assert past_the_door(source, path) == found


def test_no_module_imports_itself_in_a_circle():
    assert not cycles(import_graph(SOURCES, with_types=True))


HOUSE = {
    "a/__init__.py": "from a.x import f\nfrom a.y import g",
    "a/x.py": "from a.y import g",
    "a/y.py": "",
    "b.py": "from a import f",
}


def test_names_are_followed_through_doors():
    graph = import_graph(HOUSE, with_types=False)
    assert graph == {"a.x": {"a.y"}, "a.y": frozenset(), "b": {"a.x"}}
    assert longest_chain(graph) == ("b", "a.x", "a.y")
    assert one_importer(graph) == ["a.x", "a.y"]
    assert cycles(graph) == []
    assert folder_sizes(HOUSE) == {"a": 2, "": 1}
    assert module_name("a/__init__.py") == "a"


@pytest.mark.parametrize("with_types", [True, False])
def test_a_circle_is_seen_also_where_only_types_close_it(with_types: bool):
    closing = {"a/y.py": "if TYPE_CHECKING:\n    from b import h"}
    assert cycles(import_graph(HOUSE | closing, with_types=with_types)) == [("a.x", "a.y", "b")] * with_types


def private_imports(source: str) -> list[str]:
    """Names with a leading underscore that are imported from the packages, or from below one of their modules."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    names = [f"{n.module}.{alias.name}" for n in imports for alias in n.names if alias.name != "*"]
    return sorted(name for name in names if name.partition(".")[0] in PACKAGES and "._" in name)


@pytest.mark.parametrize("path", sorted(read_sources("benchmarks")))
def test_benchmarks_use_public_names_alone(path: str):
    assert not private_imports(read_sources("benchmarks")[path]), path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from serving.gates.gates import _result, GATES", ["serving.gates.gates._result"]),
        ("def f():\n    from rl_actors._x import y", ["rl_actors._x.y"]),
        ("from torch import _C\nfrom game_loop import _x\nfrom rl_actors import errors", []),
    ],
)
def test_a_private_import_is_seen(source: str, found: list[str]):
    assert private_imports(source) == found


@pytest.mark.parametrize(
    ("settings", "unloaded"),
    [([], {"numpy"}), (["release.gates=[task_success_not_worse]"], {"scipy.stats"})],
    ids=["the article's gates", "another gate"],
)
def test_a_spec_is_read_without_loading_an_engine(settings: list[str], unloaded: set[str]):
    """`seatrial validate` answers at once: what it needs must not pull in torch, Ray or MLflow, nor all of scipy."""
    probe = "import contextlib, sys, cluster.cli, cluster.plan, cluster.records\n"
    probe += "from cluster.spec import load_spec, override\nfrom rl_actors.contracts import BadInputError\n"
    probe += f"with contextlib.suppress(BadInputError): override(load_spec('support_desk'), {settings})\n"
    probe += "print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert not {"torch", "ray", "mlflow", "vllm", "transformers", "deepspeed", *unloaded} & set(done.stdout.split())
