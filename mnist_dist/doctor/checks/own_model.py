"""A network of the user's own, as a process of its own has tried it."""

from typing import Any

from mnist_dist.config.model import KerasConfig
from mnist_dist.doctor.finding import Finding, from_message
from mnist_dist.doctor.probe import Outcome

_CHECK = "python -m mnist_dist.check_model has a verdict for every layer"


def check_own_model(config: KerasConfig, outcome: Outcome, *, mode: str) -> Finding:
    """Whether a training in this mode, exact or fast, would take it; "" if the mode is unknown."""
    name, answers, factory = "network", outcome.answers, f"model.factory={config.factory}"
    if problem := answers.get("no images"):
        return Finding(name, "unknown", f"{factory} was not tried, as the data set cannot be loaded: {problem}")
    if problem := answers.get("error"):
        return from_message(name, problem, fix=f"correct this; {_CHECK}")
    told: dict[str, Any] | None = answers.get("verdicts")
    if told is None:
        if "started" not in answers:
            return Finding(name, "unknown", f"{factory} was not tried: TensorFlow's import {outcome.describe()}")
        fix = "look at what the function waits for; if it is only slow: timeout_s=300"
        if not outcome.expired:
            fix = "look at what the function does: nothing in it may end the process"
        return Finding(name, "error", f"{factory}: building and trying it {outcome.describe()}", fix)
    if told["refused"]:
        return Finding(name, "error", f"{factory}: cannot be trained: {told['refused']}", f"change this; {_CHECK}")
    facts = {"model.parameters": str(told["num_parameters"]), "model.code": told["code"][:12]}
    if told["fast_only"]:
        found, fix = f"{factory}: needs reproducibility=fast: {told['fast_only']}", f"reproducibility=fast; {_CHECK}"
        return Finding(name, "warning" if mode == "fast" else "error", found, fix, facts=facts)
    found = f"{factory}: {told['num_layers']} layers can be trained, {told['num_parameters']:,} parameters"
    return Finding(name, "ok", found, facts=facts)
