"""No child outlives the benchmark, whatever ends it: even SIGKILL, after which nothing can be cleaned up here."""

import subprocess


class Guard:
    """A process that kills all that it was told of once this one is gone."""

    def __init__(self) -> None:
        # Its input ends when this process does, however that comes about.
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
        # Before its input ends: the numbers may be those of other processes by now.
        self._process.kill()
        self._process.communicate()

    def watch(self, pid: int) -> None:
        """Remember a process, which need not be a child of this one."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n".encode())
        self._process.stdin.flush()
