"""Versions of the software that results depend on."""

import platform
import sys
from importlib import metadata

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
