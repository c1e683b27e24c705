"""The layout that README describes: one stem an op, imports in one direction, no private name across files."""

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import seeded_bugs
import seeded_waits

ROOT = Path(__file__).resolve().parents[1]
OPS = [p.stem for p in sorted((ROOT / "autoregembed" / "ops").glob("[a-z]*.py"))]
MODULES = {
    **{f"autoregembed.{'.'.join(p.relative_to(ROOT / 'autoregembed').with_suffix('').parts)}": p
       for p in (ROOT / "autoregembed").rglob("*.py")},
    **{f"autoregembed.{'.'.join(p.relative_to(ROOT).with_suffix('').parts)}": p
       for folder in ("kernels", "bench") for p in (ROOT / folder).rglob("*.py")},
}  # fmt: skip
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that a `from … import` in the module `name` reads."""
    if not node.level:
        return node.module or ""
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def imports(name: str, body: Iterable[ast.stmt]) -> set[str]:
    """Our modules that these statements import, packages aside."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(name, node)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {module for module in found if module in MODULES and MODULES[module].stem != "__init__"}


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements below a node, those inside functions too; not what type checkers alone read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child)


def test_the_ops_are_found():
    assert {"linear_logprob", "info_nce", "pool_last_k"} <= {*OPS}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_stem(op):
    found = {p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"*/**/{op}.py")}
    tests = {p.name for p in (ROOT / "tests").glob(f"test_*{op}.py")}
    assert f"autoregembed/ops/{op}.py" in found
    assert (ROOT / "bench" / f"bench_{op}.py").is_file()
    assert tests
    # The specification is all that some need; the others run the kernels of their parts.
    without = ("compression_loss", "generative_info_nce", "conditional_alignment", "conditional_compression")
    if op not in without:
        assert any(name.startswith("kernels/") for name in found)
    specification = {node.name for node in tree(ROOT / "autoregembed" / "reference.py").body if hasattr(node, "name")}
    assert op in specification


def test_modules_import_in_one_direction():
    graph = {name: imports(name, statements(tree(path))) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 100
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError naming the circle
    assert order.index("autoregembed.objective") > order.index("autoregembed.decoder")


def test_kernels_are_leaves():
    kernels = {name for name in MODULES if name.startswith("autoregembed.kernels.")}
    assert len(kernels) > 10
    for name in kernels:
        assert imports(name, statements(tree(MODULES[name]))) <= kernels, name


def test_no_private_name_crosses_a_file():
    places = [*MODULES.items(), *((p.stem, p) for p in (ROOT / "tests").glob("*.py"))]
    for name, path in places:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = absolute(name, node) if name in MODULES else node.module or ""
            if module in MODULES:
                private = {a.name for a in node.names if a.name.startswith("_")} - {"__version__", "_native"}
                assert not private, f"{path.name} imports {private} from {module}"


def test_files_and_functions_fit_on_a_few_screens():
    for name, path in MODULES.items():
        if not name.startswith("autoregembed.bench") and name != "autoregembed.kernels.triton.linear_logprob":
            assert len(path.read_text().splitlines()) <= 500, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 120, f"{path}: {node.name}"


def test_every_seeded_fault_has_its_line():
    """The nightly lists put faults in place of lines, which a change of those files may have removed."""
    places = [(f"kernels/triton/{file}.py", old) for _, file, old, *_ in seeded_bugs.BUGS]
    places += [(file, line) for file, line, _ in seeded_waits.WAITS]
    assert not [place for place in places if place[1] not in (ROOT / place[0]).read_text(encoding="utf-8")]
