"""The wheel carries conf/ and the bands, and runs from anywhere."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from support import CHECKOUT

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the built wheel; everything else comes from the packages already installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # A plain path entry: the .pth files there, such as an editable install's, are not read.
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    return folder / "env" / "bin"


def test_the_wheel_composes_its_configuration(installed, tmp_path):
    code = "import mnist_dist; from mnist_dist.config.compose import compose_config; print(mnist_dist.__file__)\n"
    code += "print(compose_config('experiment=debug', 'model=cnn').trainer.epochs)\n"
    code += "from mnist_dist.verify.bands import load_stored; print(len(load_stored()['bands']))"
    result = subprocess.run(
        [installed / "python", "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=100, check=True
    )
    location, epochs, num_bands = result.stdout.split()
    assert Path(location).is_relative_to(installed.parent)
    assert epochs == "3"
    assert num_bands == "6"


def test_the_console_scripts_train_and_evaluate(installed, small_npz, tmp_path):
    args = ["data=npz", f"data.path={small_npz}", "trainer.epochs=1", "run_dir=run", "plots.reference=original"]
    for command in ([installed / "mnist-dist-train", *args], [installed / "mnist-dist-evaluate", "run_dir=run"]):
        result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "evaluation_test.json").is_file()


def test_a_console_script_finds_a_network_in_the_current_folder(installed, small_npz, tmp_path):
    """Unlike `python -m`, it does not put that folder on the search path by itself."""
    (tmp_path / "net.py").write_text((CHECKOUT / "tests/support/factories/refused.py").read_text())
    command = [installed / "mnist-dist-check-model", "model.factory=net:good", "data=npz", f"data.path={small_npz}"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("4 classes; every layer can be trained\n")
