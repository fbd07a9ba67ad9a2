"""The import rule: imports point to lower layers, nobody imports an entry point, backends stay in their room."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mnist_dist"

# Lower layers first; modules of one layer do not import each other unless listed as a pair below.
LAYERS = [
    ["__init__", "errors"],
    ["files", "history", "memory", "metrics", "topology", "surroundings"],
    ["reference"],
    ["rendezvous", "gpus", "checkpoint", "preemption"],
    ["config", "console", "agreement", "peers"],
    ["data.formats", "results"],
    ["data.sources", "data.digits"],
    ["data.preprocess", "data.batches", "data.shards"],
    ["dropout", "footprint", "optimizer", "precision", "runtime", "scaling"],
    ["model"],
    ["strategy.base"],
    ["strategy.mirrored", "strategy.horovod"],
    ["strategy.multiworker"],
    ["strategy"],
    ["reduction"],
    ["steps"],
    ["trainer", "plots", "artifacts"],
    ["training"],
    ["explain", "command_line", "resuming"],
    ["cli"],
    ["benchmark"],
    ["benchmark.protocol", "benchmark.guard", "benchmark.machine", "benchmark.contenders"],
    ["benchmark.startup", "benchmark.referee", "benchmark.keras_fit", "benchmark.pytorch"],
    ["benchmark.report", "benchmark.chart", "benchmark.floor", "benchmark.ours"],
    ["train", "evaluate", "benchmark.child", "benchmark.__main__"],
]
ENTRY_POINTS = ["train", "evaluate", "benchmark.child", "benchmark.__main__"]
SAME_LAYER = {("data.sources", "data.digits")}
FORBIDDEN = {
    "scaling": ["config", "topology", "rendezvous", "agreement", "strategy", "model", "steps"],
    "data": ["dropout", "model", "optimizer", "strategy", "steps"],
    "model": ["data", "strategy", "topology"],
    "strategy": ["data", "model", "steps", "optimizer"],
    "checkpoint": ["topology", "rendezvous", "gpus"],
    "trainer": ["strategy", "steps", "model", "artifacts", "plots"],
    "plots": ["strategy", "steps", "model"],
    "artifacts": ["strategy", "steps", "model"],
    "results": ["strategy", "steps", "model"],
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full.removeprefix("mnist_dist.") in MODULES else str(node.module))
    own = {name.removeprefix("mnist_dist").lstrip(".") or "__init__" for name in found if name.startswith("mnist_dist")}
    return own & set(MODULES)


def layer_of(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer():
    listed = {module for layer in LAYERS for module in layer} | {"data"}
    assert set(MODULES) == listed


@pytest.mark.parametrize("module", [name for name in MODULES if name != "data"])
def test_imports_point_down(module):
    for imported in imports_of(MODULES[module]):
        allowed = layer_of(imported) < layer_of(module) or (module, imported) in SAME_LAYER
        assert allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_rooms_do_not_know_each_other(module):
    for room, forbidden in FORBIDDEN.items():
        if module == room or module.startswith(f"{room}."):
            bad = [name for name in imports_of(MODULES[module]) if name.split(".")[0] in forbidden]
            assert not bad, f"{module} imports {bad}"


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_an_entry_point(module):
    assert not imports_of(MODULES[module]) & set(ENTRY_POINTS)


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("topology", "surroundings")])
def test_few_read_the_environment(module):
    source = MODULES[module].read_text()
    assert not re.search(r"os\.getenv|environ\.get|environ\[[^]]+\](?! =)", source)


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("strategy")])
def test_backends_stay_in_their_room(module):
    assert not re.search(
        r"import horovod|from horovod|tf\.distribute\.|==\s*[\"'](horovod|mirrored|multiworker)",
        MODULES[module].read_text(),
    )


def test_no_rank_checks_at_call_sites():
    """Who writes is decided in one place."""
    users = [name for name, path in MODULES.items() if re.search(r"\brank(\(\))?\s*==\s*0", path.read_text())]
    assert set(users) <= {"topology", "console"}
