"""These tests start no programs: `make test-quick` runs all of them, often."""

import sys

import pytest

STARTS = {"os.exec", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
_running = []


def watch(event: str, args: tuple) -> None:
    if _running and event in STARTS:
        raise AssertionError(
            f"a unit test starts a program ({event} {args[0] if args else ''}): it belongs in tests/jobs"
        )


sys.addaudithook(watch)


@pytest.fixture(autouse=True)
def no_program():
    _running.append(True)
    yield
    _running.pop()
