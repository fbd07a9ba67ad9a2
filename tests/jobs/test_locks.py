"""Locks between real processes."""

import os

from support.processes import wait_until

from mnist_dist.base.files import (
    file_lock,
    open_locked,
)

COUNT = """
import sys, time
from pathlib import Path
from mnist_dist.base.files import file_lock
counter = Path("counter")
for _ in range(20):
    with file_lock(Path("folder/lock")):
        value = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(value + 1))
"""


def test_a_lock_keeps_processes_apart(tmp_path, start_python):
    (tmp_path / "counter").write_text("0")
    processes = [start_python("-c", COUNT, cwd=tmp_path) for _ in range(3)]
    assert [process.codes() for process in processes] == [[0]] * 3
    assert (tmp_path / "counter").read_text() == "60"


def test_a_lock_ends_with_its_process(tmp_path, start_python):
    code = (
        "import time; from pathlib import Path; from mnist_dist.base.files import file_lock\n"
        "with file_lock(Path('lock')): Path('held').touch(); time.sleep(600)"
    )
    process = start_python("-c", code, cwd=tmp_path)
    wait_until((tmp_path / "held").exists)
    process.kill()
    with file_lock(tmp_path / "lock"):
        pass  # would wait forever


def test_a_started_program_does_not_inherit_the_lock(tmp_path, start_python):
    code = (
        "import subprocess, time; from pathlib import Path; from mnist_dist.base.files import open_locked\n"
        "open_locked(Path('lock')); null = subprocess.DEVNULL\n"
        "subprocess.Popen(['sleep', '10'], close_fds=False, stdout=null, stderr=null)\n"
        "print('started', flush=True); time.sleep(600)"
    )
    process = start_python("-c", code)
    wait_until(lambda: process.output() == "started\n")
    process.processes[0].kill()
    process.codes()
    os.close(open_locked(tmp_path / "lock"))


BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from mnist_dist.config.data import DataConfig
from mnist_dist.data import digits
from mnist_dist.data.dataset import array_digests
from mnist_dist.data.load import load_dataset

here = Path.cwd()
arrays = dict(np.load(sys.argv[1]))

def generate_digits(on_progress=None):
    with (here / "built").open("a") as stream:
        stream.write("x")
    time.sleep(0.5)  # long enough that the others come in that time
    return arrays

digits.generate_digits = generate_digits
digits.DIGITS_SHA256 = array_digests(arrays)
(here / f"ready{sys.argv[2]}").touch()
while len(list(here.glob("ready*"))) < 3:
    time.sleep(0.005)
cache = str(here / "cache")
config = DataConfig(name="digits", cache_dir=cache, keras_home=cache, val_fraction=0.1, split_seed=0)
print(load_dataset(config).sha256)
"""


def test_simultaneous_processes_build_once(start_python, small_npz, tmp_path):
    processes = [start_python("-c", BUILD, small_npz, number, cwd=tmp_path) for number in range(3)]
    (digest,) = {process.wait()[0].stdout for process in processes}
    assert len(digest.strip()) == 64
    assert (tmp_path / "built").read_text() == "x"
