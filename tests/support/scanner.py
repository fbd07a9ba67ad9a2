"""A stranger who connects to all ports at which a job listens. Without TensorFlow."""

import contextlib
import socket
import threading
from collections import Counter

import psutil

from mnist_dist.launch.ports import OWN_PORTS
from support.processes import family

GREETING = b"mnist\0\r\n"
WORDS = (b"", b"\0" * 100, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", GREETING + b"x" * 100, b'{"rank": 1}\n', b"{")


def listeners(processes) -> set[int]:
    """The ports of our range at which these or their descendants listen: other tests have jobs of their own."""
    found = set()
    for process in (one for top in processes for one in family(top)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):  # it is just ending
            found |= {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return found & set(OWN_PORTS)


class Scanner:
    """Connects to all of them, again and again, in threads; says nothing, or anything, and stays, leaves, or resets."""

    def __init__(self):
        self.processes: list[psutil.Process] = []
        """Those whose ports it visits."""
        self.failures: list[Exception] = []
        self._ports: set[int] = set()
        self.greeted: Counter[int] = Counter()
        """How often a gate has greeted it, by port."""
        self.elsewhere: set[int] = set()
        """Ports of gates that answer at another address of this machine than that of the ranks."""
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._guard, args=[self._scan, words]) for words in WORDS]
        self._threads.append(threading.Thread(target=self._guard, args=[self._look]))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.failures

    def _guard(self, act, *args):
        try:
            act(*args)
        except Exception as error:  # reported at the end
            self.failures.append(error)

    def _look(self):
        while not self._is_over.wait(0.02):
            self._ports = listeners(tuple(self.processes))

    def _scan(self, words):
        held = []
        for round_number in range(10**9):
            for port in self._ports:
                with contextlib.suppress(OSError):
                    held.append(self._visit(port, words, resets=round_number % 3 == 0))
            while len(held) > 50:
                held.pop(0).close()
            if self._is_over.wait(0.02):
                break
        for one in held:
            one.close()

    def _visit(self, port, words, *, resets):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(words)
        connection.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            if connection.recv(100).startswith(GREETING):
                self.greeted[port] += 1
                self._try_elsewhere(port)
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        return connection

    def _try_elsewhere(self, port):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.9", port), timeout=5) as connection:
            connection.settimeout(0.1)
            if connection.recv(100).startswith(GREETING):  # TensorFlow's server may be there already
                self.elsewhere.add(port)
