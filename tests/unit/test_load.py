"""Where images come from: every way to get MNIST and how each fails, the digits' cache, the user's own files."""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import logging
import os
import pickle
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.config.data import DataConfig
from mnist_dist.data import digits, digits_cache, mnist
from mnist_dist.data.dataset import ARRAY_NAMES, ImageDataset, array_digests
from mnist_dist.data.load import load_dataset

IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

# Test names must be the same in every process, so the content must not include the time.
compress = functools.partial(gzip.compress, mtime=0)


@pytest.fixture
def create_config(tmp_path):
    """A DataConfig whose caches are in an empty folder."""

    def create(name, path=None, **changes):
        values = {
            "path": path if path is None else str(path),
            "cache_dir": str(tmp_path / "cache"),
            "keras_home": str(tmp_path / "keras"),
            "val_fraction": 0.175,
            "split_seed": 0,
        }
        return DataConfig(name=name, **{**values, **changes})

    return create


@pytest.fixture
def fake_mnist(small_arrays, monkeypatch):
    """Makes the small arrays pass for MNIST; returns them as the bytes of an .npz file."""
    monkeypatch.setattr(mnist, "MNIST_SHA256", array_digests(small_arrays))
    content = to_npz(small_arrays)
    monkeypatch.setattr(mnist, "MNIST_FILE_SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def fake_digits(small_arrays, monkeypatch):
    """Makes the small arrays pass for the digits; returns a list that grows each time they are built."""
    built = []

    def generate_digits(on_progress=None):
        on_progress(1, 1)
        built.append(1)
        return small_arrays

    monkeypatch.setattr(digits, "generate_digits", generate_digits)
    monkeypatch.setattr(digits, "DIGITS_SHA256", array_digests(small_arrays))
    monkeypatch.setattr(digits, "DIGITS_VERSION", 99)
    return built


@pytest.fixture
def serve(monkeypatch):
    """Download MNIST from a local server; `serve(handle)` answers by calling handle(request)."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with contextlib.ExitStack() as stack:

        def start(handle):
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    requests.append(self.path)
                    handle(self)

                def log_message(self, *_):
                    pass

            requests = []
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            monkeypatch.setattr(mnist, "MNIST_URL", f"http://127.0.0.1:{server.server_port}/mnist.npz")
            return requests

        yield start


@pytest.fixture
def no_network(monkeypatch):
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(mnist, "MNIST_URL", f"http://127.0.0.1:{port}/mnist.npz")


def to_npz(arrays, save=np.savez):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def to_idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.tobytes()


def write_idx(folder, arrays, *, compress):
    folder.mkdir()
    for key, name in IDX_NAMES.items():
        content = to_idx(arrays[key])
        (folder / (name + ".gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)
    return folder


def send(content):
    """A handler that answers with this body."""

    def handle(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    return handle


def assert_arrays(dataset, arrays):
    for key in ARRAY_NAMES:
        assert np.array_equal(getattr(dataset, key), arrays[key])
        assert getattr(dataset, key).dtype == arrays[key].dtype


def error_of(config):
    with pytest.raises(UserError) as caught:
        load_dataset(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# MNIST


def test_the_real_mnist(mnist_path, create_config):
    dataset = load_dataset(create_config("mnist", mnist_path))
    assert dataset.name == "mnist"
    assert dataset.x_train.shape == (60_000, 28, 28)
    assert dataset.x_test.shape == (10_000, 28, 28)
    assert np.bincount(dataset.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert load_dataset(create_config("npz", mnist_path)).sha256 == dataset.sha256


def test_the_real_mnist_with_one_pixel_changed(mnist_path, create_config, tmp_path):
    with np.load(mnist_path) as content:
        arrays = {key: content[key].copy() for key in ARRAY_NAMES}
    arrays["x_test"][9_999, 27, 27] ^= 1
    np.savez(tmp_path / "changed.npz", **arrays)
    message = error_of(create_config("mnist", tmp_path / "changed.npz"))
    assert message.startswith(f"data.path={tmp_path}/changed.npz: x_test is not MNIST's (SHA-256 ")
    assert "data=npz" in message


@pytest.mark.parametrize("compress", [False, True])
def test_idx_folder(compress, small_arrays, fake_mnist, create_config, tmp_path):
    folder = write_idx(tmp_path / "idx", small_arrays, compress=compress)
    dataset = load_dataset(create_config("mnist", folder))
    assert_arrays(dataset, small_arrays)
    # However the arrays are packed, it is the same data set.
    (tmp_path / "mnist.npz").write_bytes(fake_mnist)
    assert load_dataset(create_config("mnist", tmp_path / "mnist.npz")).sha256 == dataset.sha256


def test_idx_names_with_a_dot(small_arrays, fake_mnist, create_config, tmp_path):
    """Some mirrors spell train-images.idx3-ubyte."""
    folder = write_idx(tmp_path / "idx", small_arrays, compress=False)
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("-idx", ".idx"))
    assert_arrays(load_dataset(create_config("mnist", folder)), small_arrays)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no file t10k-labels-idx?-ubyte or .gz in this folder"),
        (b"", "not an IDX file of 1-dimensional uint8"),
        (to_idx(np.zeros((120, 1), np.uint8)), "not an IDX file of 1-dimensional uint8"),
        (to_idx(np.zeros(120, np.uint8))[:-1], "it has 119 bytes of data but its header says 120"),
        (to_idx(np.zeros(120, np.uint8)) + b"1", "it has more than 120 bytes of data but its header says 120"),
        (
            gzip.compress(to_idx(np.zeros(120, np.uint8)) + bytes(10**8), mtime=0),
            "it has more than 120 bytes of data but",
        ),
        (bytes([0, 0, 8, 1]) + b"\xff" * 4, "it has 0 bytes of data but its header says 4294967295"),
        (
            gzip.compress(bytes([0, 0, 8, 1]) + b"\xff" * 4, mtime=0),
            "it has 0 bytes of data but its header says 4294967295",
        ),
        (b"\x00\x00\x08\x01\x00", "not a usable data file"),
        (compress(to_idx(np.zeros(120, np.uint8)))[:-9], "Compressed file ended before"),
        (compress(to_idx(np.zeros(120, np.uint8)))[:-8] + bytes(8), "CRC check failed"),
        (to_idx(np.zeros(120, np.uint8)), "y_test is not MNIST's"),
    ],
)
def test_damaged_idx_folder(content, problem, small_arrays, fake_mnist, create_config, tmp_path):
    folder = write_idx(tmp_path / "idx", small_arrays, compress=False)
    path = folder / IDX_NAMES["y_test"]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = error_of(create_config("mnist", folder))
    assert message.startswith(f"data.path={folder}")
    assert problem in message


def test_keras_cache_is_read(fake_mnist, small_arrays, create_config, tmp_path, no_network):
    home = tmp_path / "elsewhere"
    (home / "datasets").mkdir(parents=True)
    (home / "datasets" / "mnist.npz").write_bytes(fake_mnist)
    assert_arrays(load_dataset(create_config("mnist", keras_home=str(home))), small_arrays)
    assert load_dataset(create_config("auto", keras_home=str(home))).name == "mnist"


def test_damaged_keras_cache(fake_mnist, create_config, tmp_path):
    path = tmp_path / "keras" / "datasets" / "mnist.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(fake_mnist[:1000])
    message = error_of(create_config("mnist"))
    assert message.startswith(f"data=mnist: delete {path}, which is damaged, to have it downloaded again")
    assert path.exists()  # the user's file: theirs to delete


def test_download(fake_mnist, small_arrays, create_config, tmp_path, serve, logged):
    requests = serve(send(fake_mnist))
    path = tmp_path / "keras" / "datasets" / "mnist.npz"
    for _ in range(2):
        assert_arrays(load_dataset(create_config("mnist")), small_arrays)
    assert requests == ["/mnist.npz"]  # by the second time it is there
    assert path.read_bytes() == fake_mnist
    assert logged() == [f"downloading MNIST to {path}"]
    assert {p.name for p in path.parent.iterdir()} <= {"mnist.npz", "mnist.lock"}


def test_simultaneous_loads_download_once(fake_mnist, create_config, serve):
    requests = serve(lambda request: (time.sleep(0.2), send(fake_mnist)(request)))
    threads = [threading.Thread(target=load_dataset, args=(create_config("mnist"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert requests == ["/mnist.npz"]


def break_off(request):
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"only this")


def talk_nonsense(request):
    request.wfile.write(b"who is there?\r\n\r\n")


@pytest.mark.parametrize(
    ("handle", "reason"),
    [
        (send(b"<html>please log in</html>"), "the download is not the expected file"),
        (send(b""), "the download is not the expected file"),
        (lambda request: request.send_error(404), "Not Found"),
        (break_off, "the download broke off: IncompleteRead(9 bytes read, 991 more expected)"),
        (talk_nonsense, "who is there?)"),
        (lambda _: None, "Remote end closed connection without response"),
        (None, "Connection refused"),
    ],
)
def test_failed_download_names_the_alternatives(handle, reason, fake_mnist, create_config, tmp_path, serve, no_network):
    if handle is not None:
        serve(handle)
    message = error_of(create_config("mnist"))
    path = tmp_path / "keras" / "datasets" / "mnist.npz"
    assert message.startswith(f"data=mnist: MNIST is not here and cannot be downloaded ({reason}")
    for way_out in ("give data.path=mnist.npz", f"put mnist.npz at {path}", "give data=digits"):
        assert way_out in message
    # Nothing half-written: only the lock, and the note for those that wait for it.
    assert {p.name for p in path.parent.iterdir()} <= {"mnist.lock", "mnist.failed"}


def test_a_failure_noted_by_a_clock_that_was_ahead(fake_mnist, small_arrays, create_config, tmp_path, serve):
    """It is still an old one."""
    note = tmp_path / "keras" / "datasets" / "mnist.failed"
    note.parent.mkdir(parents=True)
    note.write_text("there was no network")
    os.utime(note, (time.time() + 10**6,) * 2)
    serve(send(fake_mnist))
    assert_arrays(load_dataset(create_config("mnist")), small_arrays)


@pytest.mark.parametrize("stage", ["before the answer", "within the answer"])
def test_a_silent_server_times_out(stage, fake_mnist, create_config, serve, monkeypatch):
    """Without a time limit the handler would hold the test for minutes."""
    released = threading.Event()

    def handle(request):
        if stage == "within the answer":
            request.send_response(200)
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b"a beginning")
        released.wait(120)

    monkeypatch.setattr(mnist, "CONNECT_TIMEOUT_S", 0.3)
    serve(handle)
    started = time.monotonic()
    message = error_of(create_config("mnist"))
    took = time.monotonic() - started
    released.set()
    assert took < 60
    assert "timed out" in message or "no answer in" in message


def test_a_silent_name_server_times_out(create_config, monkeypatch):
    """A name lookup has no time limit of its own."""
    released = threading.Event()
    monkeypatch.setattr(mnist, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(mnist.urllib.request, "urlopen", lambda *_, **__: released.wait(120))
    message = error_of(create_config("mnist"))
    assert not released.is_set()
    released.set()
    assert "(no answer in 0 s)" in message


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_keras_home_that_cannot_be_written(name, fake_mnist, fake_digits, create_config, tmp_path, serve, logged):
    (tmp_path / "file").write_bytes(b"")
    requests = serve(send(fake_mnist))
    config = create_config(name, keras_home=str(tmp_path / "file" / "keras"))
    message = error_of(config) if name == "mnist" else (load_dataset(config), logged()[0])[1]
    assert "cannot be downloaded (Not a directory)" in message
    assert requests == []


# auto


def test_auto_prefers_mnist(fake_mnist, fake_digits, create_config, serve, logged):
    serve(send(fake_mnist))
    assert load_dataset(create_config("auto")).name == "mnist"
    assert fake_digits == []
    assert not any("WARNING" in message for message in logged())


def test_auto_falls_back_with_a_warning(fake_digits, create_config, no_network, logged):
    dataset = load_dataset(create_config("auto"))
    assert dataset.name == "digits"
    warnings = logged(logging.WARNING)
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING: training on the embedded digits, NOT on MNIST: data=mnist: ")
    assert "Connection refused" in warnings[0]


def test_mnist_never_falls_back(fake_digits, create_config, no_network):
    error_of(create_config("mnist"))
    assert fake_digits == []


# The embedded digits


def cache_path(tmp_path):
    return tmp_path / "cache" / "digits-v99.npz"


def test_digits_are_built_once(fake_digits, small_arrays, create_config, tmp_path, logged):
    first, second = (load_dataset(create_config("digits")) for _ in range(2))
    assert_arrays(first, small_arrays)
    assert_arrays(second, small_arrays)
    assert first.sha256 == second.sha256
    assert fake_digits == [1]
    assert cache_path(tmp_path).is_file()
    assert logged() == ["building the embedded digits data set (once; it is cached)"]


@pytest.mark.parametrize("damage", ["cut short", "empty", "another data set", "other keys", "a pickle"])
def test_damaged_digits_are_built_again(damage, fake_digits, small_arrays, create_config, tmp_path, logged):
    load_dataset(create_config("digits"))
    path = cache_path(tmp_path)
    content = {
        "cut short": path.read_bytes()[:-200],
        "empty": b"",
        "another data set": to_npz({**small_arrays, "y_test": small_arrays["y_test"][::-1]}),
        "other keys": to_npz({"x": np.zeros(3)}),
        "a pickle": pickle.dumps(small_arrays),
    }[damage]
    path.write_bytes(content)
    for _ in range(2):  # by the second time it is intact again
        assert_arrays(load_dataset(create_config("digits")), small_arrays)
    assert len(fake_digits) == 2
    assert [message for message in logged() if "damaged" in message] == [
        f"the cached digits at {path} are damaged; building them again"
    ]


def test_digits_without_a_place_for_the_cache(fake_digits, small_arrays, create_config, tmp_path, logged):
    (tmp_path / "file").write_bytes(b"")
    config = create_config("digits", cache_dir=str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert_arrays(load_dataset(config), small_arrays)
    assert len(fake_digits) == 2
    assert "(Not a directory): they are built each time" in logged()[0]


def test_digits_with_a_full_disk(fake_digits, small_arrays, create_config, tmp_path, monkeypatch, logged):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits_cache, "write_atomically", fail)
    assert_arrays(load_dataset(create_config("digits")), small_arrays)
    assert logged()[-1] == f"cannot cache the digits at {cache_path(tmp_path)} (No space left on device)"


def test_digits_that_differ_from_the_recorded_ones(fake_digits, small_arrays, create_config, monkeypatch, logged):
    monkeypatch.setattr(digits, "DIGITS_SHA256", dict.fromkeys(ARRAY_NAMES, "0"))
    assert_arrays(load_dataset(create_config("digits")), small_arrays)
    assert any("differ from the expected ones" in message for message in logged())


# The user's own arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, small_arrays, create_config, tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(to_npz({**small_arrays, "more": np.zeros(3)}, save))
    dataset = load_dataset(create_config("npz", path))
    assert dataset.name == "npz"
    assert_arrays(dataset, small_arrays)


def test_a_file_that_is_written_while_it_is_read(small_arrays, create_config, tmp_path):
    """In place, over and over: what is read is intact and the digest matches it, or else there is one line."""
    path = tmp_path / "moving.npz"
    contents = []
    for shift in (0, 1):
        stream = io.BytesIO()
        np.savez(stream, **{**small_arrays, "x_train": small_arrays["x_train"] + np.uint8(shift)})
        contents.append(stream.getvalue())
    path.write_bytes(contents[0])
    is_over = threading.Event()

    def write() -> None:
        for content in itertools.cycle(contents):
            with path.open("r+b") as file:
                for start in range(0, len(content), 4096):
                    file.write(content[start : start + 4096])
                    file.flush()
            if is_over.is_set():
                return

    def load() -> str:
        try:
            dataset = load_dataset(create_config("npz", path=str(path)))
        except UserError as error:
            assert str(error).startswith(f"data.path={path}: ")
            assert "\n" not in str(error)
            return "refused"
        assert dataset.sha256 == ImageDataset.from_arrays("npz", vars(dataset)).sha256
        return dataset.sha256

    writer = threading.Thread(target=write)
    writer.start()
    try:
        ends = {load() for _ in range(200)}
    finally:
        is_over.set()
        writer.join()
    assert "refused" in ends
    assert len(ends - {"refused"}) <= 2  # never a mixture


def test_npz_kinds_of_images_and_labels(small_arrays, create_config, tmp_path):
    for dtype in (np.float16, np.float32, ">f8"):
        for label_dtype in (np.uint8, np.int32, np.int64, np.uint64):
            arrays = {key: value.astype(label_dtype) for key, value in small_arrays.items()}
            for key in ("x_train", "x_test"):
                arrays[key] = (small_arrays[key] / 255).astype(dtype)[..., None]
            np.savez(tmp_path / "mine.npz", **arrays)
            assert_arrays(load_dataset(create_config("npz", tmp_path / "mine.npz")), arrays)


def test_the_digest_covers_shape_type_and_every_array(small_arrays, create_config, tmp_path):
    variants = [
        small_arrays,
        {
            **small_arrays,
            "x_train": small_arrays["x_train"].reshape(600, 4, 16),
            "x_test": np.zeros((120, 4, 16), "u1"),
        },
        {**small_arrays, "y_train": small_arrays["y_train"].view(np.int8)},
        *({**small_arrays, key: small_arrays[key][::-1]} for key in ARRAY_NAMES),
    ]
    digests = set()
    for arrays in variants:
        np.savez(tmp_path / "mine.npz", **arrays)
        digests.add(load_dataset(create_config("npz", tmp_path / "mine.npz")).sha256)
    assert len(digests) == len(variants)


def test_home_folders(small_npz, create_config, monkeypatch):
    monkeypatch.setenv("HOME", str(small_npz.parent))
    assert load_dataset(create_config("npz", "~/small.npz")).name == "npz"
    assert error_of(create_config("npz", "~nobody-here/a.npz")).startswith("data.path=~nobody-here/a.npz: no such user")


def test_never_unpickles(create_config, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "bomb.npz"
    objects = np.array([Bomb()], object)
    np.savez(path, **dict.fromkeys(ARRAY_NAMES, objects))
    assert "pickled objects, which are never loaded" in error_of(create_config("npz", path))
    path.write_bytes(pickle.dumps(Bomb()))
    assert "it is not an .npz archive" in error_of(create_config("npz", path))
    assert not (tmp_path / "exploded").exists()


def test_flipped_bytes_never_end_in_a_traceback(small_arrays, create_config, tmp_path):
    """Whatever NumPy, zipfile and zlib raise for damaged bytes becomes one line."""
    generator = np.random.default_rng(0)
    tiny = {key: value[:8] for key, value in small_arrays.items()}
    path = tmp_path / "mine.npz"
    refused = 0
    for save in (np.savez, np.savez_compressed):
        good = np.frombuffer(to_npz(tiny, save), np.uint8)
        for _ in range(400):
            bad = good.copy()
            bad[generator.integers(len(bad), size=2)] = generator.integers(256, size=2)
            path.write_bytes(bad.tobytes()[: generator.choice([None, len(bad) // 2], p=[0.9, 0.1])])
            try:
                load_dataset(create_config("npz", path))
            except UserError as error:
                refused += 1
                assert str(error).startswith(f"data.path={path}: ")
                assert "\n" not in str(error)
    assert refused > 600


@pytest.mark.parametrize("member", [b"not an array", b""])
def test_a_zip_of_something_else(member, create_config, tmp_path):
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ARRAY_NAMES:
            archive.writestr(f"{name}.npy", member)
    assert error_of(create_config("npz", path)).startswith(f"data.path={path}: not a usable data file: ")


def test_processes_that_wait_for_a_download_do_not_try_it_again(monkeypatch, tmp_path):
    """Otherwise each of many ranks on a machine without a network would cost another time-out."""
    tries = []

    def fetch(url):
        tries.append(url)
        time.sleep(0.5)
        raise OSError("nobody answers")

    monkeypatch.setattr(mnist, "_fetch", fetch)
    errors = []

    def ask():
        try:
            mnist._download_mnist(tmp_path / "mnist.npz")
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(tries) == 1
    assert len(errors) == 3
    assert all("cannot be downloaded (nobody answers)" in error for error in errors)
    with pytest.raises(UserError):  # a later process does try
        mnist._download_mnist(tmp_path / "mnist.npz")
    assert len(tries) == 2
