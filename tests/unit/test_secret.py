"""Where the secret of a job comes from, and what is refused."""

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.launch.secret import SECRET_VARIABLE, meeting_key, watch_key
from mnist_dist.launch.topology import HorovodRun, Step, TFConfig, Topology

WORKER = Topology(TFConfig(("127.0.0.1:1", "127.0.0.1:2")), 0, 2, 0, 2)
TASK = Topology(Step(("a", "b"), ("a:1",), "7"), 1, 2)
HOROVOD = Topology(HorovodRun("127.0.0.1:1"), 0, 2)
PLACE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, and an empty folder for temporary files beside it."""
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def secret(home) -> Path:
    return home / ".cache/mnist_dist/private/secret"


def test_all_processes_of_a_user_have_one(secret, home):
    key = meeting_key(WORKER, PLACE)
    assert len(key) == 32
    assert meeting_key(TASK, PLACE) == key
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]
    secret.unlink()
    assert meeting_key(WORKER, PLACE) != key


def test_where_the_caches_are(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    meeting_key(WORKER, PLACE)
    assert (home / "elsewhere/mnist_dist/private/secret").is_file()
    assert not (home / ".cache").exists()


def test_the_variable_comes_first(home, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "a secret of the job")
    key = meeting_key(WORKER, PLACE)
    assert meeting_key(HOROVOD, PLACE) == key
    assert not list(home.iterdir())
    monkeypatch.setenv(SECRET_VARIABLE, " a secret of the job\n")
    assert meeting_key(WORKER, PLACE) == key
    monkeypatch.setenv(SECRET_VARIABLE, "another secret of a job")
    assert meeting_key(WORKER, PLACE) != key


def test_a_short_one_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "hunter2")
    with pytest.raises(
        UserError, match=r"^MNIST_DIST_SECRET has 7 characters, at least 16 are needed: export "
    ) as error:
        meeting_key(WORKER, PLACE)
    assert "hunter2" not in str(error.value)


def test_an_empty_variable_counts_as_not_set(secret, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, " ")
    meeting_key(WORKER, PLACE)
    assert secret.is_file()


def test_horovodrun_needs_no_file(home):
    """What its processes tell each other is open to anybody who reaches its store: the token is all there is."""
    assert watch_key(HOROVOD, "one") != watch_key(HOROVOD, "other")
    assert not list(home.iterdir())


def test_each_purpose_and_place_has_its_own_key():
    """Who listens at one can pass nothing on to another."""
    keys = [meeting_key(WORKER, PLACE), meeting_key(WORKER, "127.0.0.9:1"), meeting_key(WORKER, "127.0.0.1:2")]
    assert len({*keys, watch_key(WORKER, "one"), watch_key(WORKER, "other")}) == 5


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_what_others_can_read_is_refused(mode, secret):
    meeting_key(WORKER, PLACE)
    secret.chmod(mode)
    with pytest.raises(UserError) as error:
        meeting_key(WORKER, PLACE)
    assert str(error.value) == (
        f"{secret}: no place for a secret, others can open it (mode {mode:03o}); remove it, or set MNIST_DIST_SECRET "
        "to the same value for all processes of the job"
    )


def test_a_folder_that_others_can_open_is_refused(secret):
    meeting_key(WORKER, PLACE)
    secret.parent.chmod(0o755)
    with pytest.raises(UserError, match=rf"^{re.escape(str(secret.parent))}: .*\(mode 755\); chmod 700 it, or set "):
        meeting_key(WORKER, PLACE)


def test_what_belongs_to_another_user_is_refused(secret, monkeypatch):
    meeting_key(WORKER, PLACE)
    monkeypatch.setattr("os.geteuid", lambda: secret.stat().st_uid + 1)
    with pytest.raises(UserError, match=r"it belongs to the user with the number \d+"):
        meeting_key(WORKER, PLACE)


@pytest.mark.parametrize("content", ["", "short\n"])
def test_a_file_without_a_secret_is_refused(content, secret):
    meeting_key(WORKER, PLACE)
    secret.write_text(content)
    with pytest.raises(UserError, match=r"holds no secret of 16 characters; remove it, and a new one will be made$"):
        meeting_key(WORKER, PLACE)


def test_a_home_that_cannot_be_written(home, tmp_path, monkeypatch):
    """Here a file is in the way: root may write anywhere."""
    monkeypatch.setenv("HOME", "/dev/null")
    key = meeting_key(WORKER, PLACE)
    (folder,) = (tmp_path / "tmp").iterdir()
    assert re.fullmatch(r"mnist_dist-\d+", folder.name)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert meeting_key(TASK, PLACE) == key
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"mnist_dist-\d+: no place for a secret, others can open it"):
        meeting_key(WORKER, PLACE)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOSPC])
def test_a_failure_that_may_pass_does_not_lead_to_another_secret(number, secret, tmp_path, monkeypatch):
    """The other processes of the job have the one at home."""
    meeting_key(WORKER, PLACE)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(
            UserError, match=r"^the secret in ~/.cache cannot be read \(.*\); start again, or set MNIST_D"
        ):
            meeting_key(WORKER, PLACE)
    assert not list((tmp_path / "tmp").iterdir())


def test_the_second_place_is_told_once(tmp_path, monkeypatch, logged):
    """Machines do not share it."""
    monkeypatch.setenv("HOME", "/dev/null")
    meeting_key(WORKER, PLACE)
    meeting_key(WORKER, PLACE)
    (text,) = logged()
    assert text.startswith(
        f"The secret of jobs is in {tmp_path}/tmp/mnist_dist-{os.geteuid()} on each machine: set MNIST_"
    )


@pytest.mark.parametrize("is_dangling", [True, False])
def test_a_link_among_the_temporary_files_is_not_followed(is_dangling, tmp_path, monkeypatch):
    """Anybody can make one there."""
    monkeypatch.setenv("HOME", "/dev/null")
    meeting_key(WORKER, PLACE)
    (folder,) = (tmp_path / "tmp").iterdir()
    target = tmp_path / "target"
    folder.rename(target)
    if is_dangling:
        target = tmp_path / "nothing"
    folder.symlink_to(target)
    with pytest.raises(UserError, match="it is a link, or something else that does not belong there"):
        meeting_key(WORKER, PLACE)


def test_no_place_at_all(monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(UserError, match=r"^a secret can be kept neither in ~/.cache nor in the folder for temporary"):
        meeting_key(WORKER, PLACE)
