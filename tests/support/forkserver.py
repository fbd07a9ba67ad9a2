"""Forks Python programs off a process that has imported their libraries: `python forkserver.py MODULE ...`.

Each line of input is a request (see `processes.ForkServer`), each line of output the process ID of the program. A
program is a process like any other from its first line to its last: its own session, environment, folder and streams.
It skips what comes before and after those lines: the import of TensorFlow, which takes 3.5 s of a core, and the
destruction of every object, which copies all memory that is shared with the server, 0.2 s.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn


def serve() -> dict:
    """Answer requests until nobody is left to ask; returns only in the forked processes, with what to run."""
    for line in sys.stdin:
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            if child := os.fork():
                os.write(writer, str(child).encode())
                os._exit(0)
            return json.loads(line)
        os.waitpid(middle, 0)  # now the tests' process adopts the child (see `ForkServer`)
        print(os.read(reader, 20).decode(), flush=True)
        os.close(reader)
        os.close(writer)
    sys.exit()


def enter(request: dict) -> None:
    """Become a process like one started by `subprocess.Popen`."""
    os.setsid()
    for descriptor, path in enumerate((os.devnull, *request["printed"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115 (for as long as the process runs)
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


def run(words: list[str]) -> None:
    """Do what `python *words` does."""
    match words:
        case ["-m", module, *_]:
            sys.argv = words[1:]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            sys.path.insert(0, "")
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [path, *_]:
            sys.argv = words
            sys.path.insert(0, str(Path(path).parent))
            runpy.run_path(path, run_name="__main__")


def run_to_exit(words: list[str]) -> None:
    """Run, and after all threads and `atexit` functions of the program leave with its exit code."""
    code = 1

    def leave() -> NoReturn:
        sys.stdout.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        run(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
request = serve()
enter(request)
run_to_exit(request["words"])
