"""No child outlives the benchmark, however it ends: even by SIGKILL, after which it cannot clean up itself."""

import subprocess


class Guard:
    """A process that kills all processes it was told to watch, once this one is gone."""

    def __init__(self) -> None:
        # Its input ends when this process does, however that happens.
        self._process = subprocess.Popen(
            ["sh", "-c", 'pids=; while read -r pid; do pids="$pids $pid"; done; kill -KILL $pids'],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the others
        )

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *_: object) -> None:
        # Before its input ends: by now the numbers may belong to other processes.
        self._process.kill()
        self._process.communicate()

    def watch(self, pid: int) -> None:
        """Watch a process, which need not be a child of this one."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n".encode())
        self._process.stdin.flush()
