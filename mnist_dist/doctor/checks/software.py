"""Python, the packages and whether they fit together, Horovod, variables that change results, the own code."""

import hashlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mnist_dist.base.surroundings import arithmetic_variables
from mnist_dist.config.compose import conf_dir
from mnist_dist.doctor.finding import Finding, from_message
from mnist_dist.doctor.probe import Outcome

PACKAGE = "mnist-dist"
# Other names under which TensorFlow is installed.
_TENSORFLOWS = ("tensorflow-cpu", "tensorflow-rocm", "tf-nightly")
_NAMES = {"tensorflow": "TensorFlow", "keras": "Keras", "numpy": "NumPy"}
_SUPPORTED_PYTHON = ">=3.10,<3.14"


class Package(NamedTuple):
    """An installed package."""

    version: str
    requires: tuple[str, ...] = ()


def installed_packages() -> dict[str, Package]:
    """This package, those that it requires, and Horovod, as far as they are installed; nothing is imported."""
    found: dict[str, Package] = {}
    wanted = [PACKAGE, *_NAMES, *_TENSORFLOWS, "horovod"]
    wanted += [Requirement(text).name for text in _requires(PACKAGE)]
    for name in map(canonicalize_name, wanted):
        try:
            found[name] = Package(metadata.version(name), _requires(name))
        except metadata.PackageNotFoundError:
            continue
    return found


def _requires(name: str) -> tuple[str, ...]:
    try:
        return tuple(metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        return ()


def check_python(version: str) -> Finding:
    """Whether this Python is supported."""
    facts = {"python": version}
    if Version(version) in SpecifierSet(_SUPPORTED_PYTHON):
        return Finding("Python", "ok", version, facts=facts, differing="warning")
    fix = "set the package up with a supported one: make setup PYTHON=python3.11"
    return Finding("Python", "error", f"{version} is not supported ({_SUPPORTED_PYTHON})", fix, facts, "warning")


def check_packages(packages: Mapping[str, Package]) -> list[Finding]:
    """A row for each of TensorFlow, Keras and NumPy, and one for all other packages that are required."""
    installed = dict(packages)
    for other in _TENSORFLOWS:
        if other in installed:
            installed.setdefault("tensorflow", installed[other])
    problems = _problems(installed)
    findings = []
    for name, shown in _NAMES.items():
        version = installed[name].version if name in installed else "none"
        # A training refuses to start only with different versions of TensorFlow.
        facts, differing = {f"version of {name}": version}, "error" if name == "tensorflow" else "warning"
        if problem := problems.pop(name, ""):
            findings.append(Finding(shown, "error", problem, _HOW_TO_INSTALL, facts, differing))  # type: ignore[arg-type]
        else:
            findings.append(Finding(shown, "ok", version, facts=facts, differing=differing))  # type: ignore[arg-type]
    others = {name: package.version for name, package in installed.items() if name not in (*_NAMES, "horovod")}
    facts = {f"version of {name}": version for name, version in others.items()}
    if PACKAGE not in installed:
        found = f"{PACKAGE} is not installed, so what it requires is unknown; it is imported from a folder"
        return [*findings, Finding("other packages", "unknown", found, "make setup", facts, "warning")]
    if problems:
        found = ", ".join(problems.values())
        return [*findings, Finding("other packages", "error", found, _HOW_TO_INSTALL, facts, "warning")]
    return [*findings, Finding("other packages", "ok", "all that are required", facts=facts, differing="warning")]


_HOW_TO_INSTALL = "install the pinned versions: make setup"


def _problems(installed: Mapping[str, Package]) -> dict[str, str]:
    """What is missing or has a version that another package does not accept, by name."""
    problems = {name: "not installed" for name in _NAMES if name not in installed}
    for owner in (PACKAGE, *_NAMES):
        for text in installed[owner].requires if owner in installed else ():
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            if name not in installed:
                if owner == PACKAGE:
                    problems.setdefault(name, f"{name} is not installed")
            elif not needed.specifier.contains(installed[name].version, prereleases=True):
                found = f"{installed[name].version} does not fit {owner} {installed[owner].version}"
                problems.setdefault(name, f"{name} {found}, which needs {needed.specifier}")
    return problems


def check_tensorflow(outcome: Outcome) -> Finding:
    """Whether TensorFlow can be imported, in time."""
    name = "TensorFlow's import"
    if (told := outcome.answers.get("tensorflow")) is not None:
        return Finding(name, "ok", f"TensorFlow {told['version']}, Keras {told['keras']}, {told['seconds']:.1f} s")
    if outcome.expired:
        fix = (
            "if it is only slow (a network file system): timeout_s=300 here, and strategy.start_timeout_s=600 for the "
            "training; else look at the file system and the driver"
        )
        return Finding(name, "error", outcome.describe(), fix)
    fix = "install the pinned versions: make setup"
    if outcome.code == -4:  # SIGILL
        fix = "this processor lacks instructions that TensorFlow was built with (AVX): use another node"
    return Finding(name, "error", outcome.describe(), fix)


def check_horovod(packages: Mapping[str, Package], outcome: Outcome, *, needed: bool, num_gpus: int) -> Finding:
    """Whether Horovod can be loaded, and has what this training needs; `needed` by its strategy."""
    version = packages["horovod"].version if "horovod" in packages else "none"
    facts = {"version of horovod": version}
    told: dict[str, Any] | None = outcome.answers.get("horovod")
    if told is None and "tensorflow" not in outcome.answers:
        return Finding("Horovod", "unknown", f"{version}, not tried: TensorFlow cannot be imported", facts=facts)
    if version == "none" and (told is None or "error" in told):
        if needed:
            return Finding("Horovod", "error", "not installed, and strategy=horovod", "make horovod", facts)
        return Finding("Horovod", "ok", "not installed, and not needed here", facts=facts)
    if told is None:
        found = f"{version}: loading it {outcome.describe()}"
        return Finding("Horovod", "error" if needed else "warning", found, "build it again: make horovod", facts)
    if "error" in told:
        finding = from_message("Horovod", told["error"], status="error" if needed else "warning")
        return Finding("Horovod", finding.status, finding.found, finding.fix, facts)
    built = ", ".join(name.upper() if name != "gloo" else "Gloo" for name in ("gloo", "nccl", "mpi") if told[name])
    found = f"{version}, fits TensorFlow; built in: {built or 'nothing'}"
    if not told["gloo"]:
        return Finding("Horovod", "error" if needed else "warning", found, "build it with Gloo: make horovod", facts)
    if num_gpus and not told["nccl"]:
        fix = "HOROVOD_GPU_OPERATIONS=NCCL make horovod"
        return Finding("Horovod", "warning", f"{found}; without NCCL sums of GPUs go over the host", fix, facts)
    return Finding("Horovod", "ok", found, facts=facts)


def check_variables(variables: Mapping[str, str]) -> Finding:
    """Variables that change what libraries compute."""
    facts = arithmetic_variables(variables)
    if facts:
        found = " ".join(f"{name}={value}" for name, value in facts.items())
        fix = f"unset {' '.join(facts)}"
        return Finding("variables", "warning", f"{found}: results differ from those without", fix, facts)
    keras = variables.get("KERAS_BACKEND", "tensorflow")
    if keras != "tensorflow":
        found = f"KERAS_BACKEND={keras} has no effect: a training sets it to tensorflow"
        return Finding("variables", "ok", found)
    return Finding("variables", "ok", "none that change results")


def check_code(version: str, digest: str) -> Finding:
    """The package's own code, the same on all ranks."""
    return Finding("code", "ok", f"mnist_dist {version}, sha256 {digest[:12]}", facts={"digest of the code": digest})


def code_digest() -> str:
    """SHA-256 of the package's source files and of `conf/`."""
    package = Path(__file__).resolve().parents[2]
    conf = conf_dir()
    return digest_of(
        [(package, path) for path in package.rglob("*.py")] + [(conf, path) for path in conf.rglob("*.yaml")]
    )


def digest_of(files: Iterable[tuple[Path, Path]]) -> str:
    """SHA-256 over names, relative to the first path of each pair, and contents."""
    digest = hashlib.sha256()
    for name, path in sorted((str(path.relative_to(root)), path) for root, path in files):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
