"""What the import rules cannot check: who reads the environment or asks for backends and ranks, and sizes."""

import ast
import re

import pytest
from support import CHECKOUT

PACKAGE = CHECKOUT / "mnist_dist"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES = 60


# The secret is in no object that could be printed.
READERS = ("launch.environment", "launch.secret", "base.surroundings")


@pytest.mark.parametrize("module", [name for name in MODULES if name not in READERS])
def test_few_read_the_environment(module):
    source = MODULES[module].read_text()
    assert not re.search(r"os\.getenv|environ\.get|environ\[[^]]+\](?! =)", source)


def test_the_doctor_is_handed_the_environment():
    """So that a test can describe any machine; one place takes the real one."""
    users = [name for name, path in MODULES.items() if name.startswith("doctor") and "os.environ" in path.read_text()]
    assert users == ["doctor.sources"]


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("strategy")])
def test_backends_stay_in_their_package(module):
    assert not re.search(r"tf\.distribute\.|==\s*[\"'](horovod|mirrored|multiworker)", MODULES[module].read_text())


def test_no_rank_checks_at_call_sites():
    """Who writes is decided in one place."""
    users = [name for name, path in MODULES.items() if re.search(r"\brank(\(\))?\s*==\s*0", path.read_text())]
    assert set(users) <= {"launch.topology", "base.console"}


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_on_a_screen(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_LINES, node.name
