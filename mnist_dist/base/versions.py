"""Versions of the software that results depend on."""

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("mnist-dist", "tensorflow", "keras", "numpy", "scikit-learn", "hydra-core", "horovod", "torch", "jax")
_SUMMARY = ("mnist_dist", "tensorflow", "keras", "numpy", "sklearn", "hydra")


def installed_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed ones of `PACKAGES`."""
    found = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {"python": platform.python_version(), **found}


def imported_versions() -> dict[str, str]:
    """Versions of Python and of the modules that computed the results, for `summary.json`."""
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in _SUMMARY}}


def package_digest() -> str:
    """SHA-256 over this package's source files: whether two machines have the same code, whatever its version."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
