"""What `auto` would choose here, and why, as the package's own functions have told."""

from dataclasses import asdict, fields
from typing import Any

from mnist_dist.config.compare import job_keys
from mnist_dist.config.train import TrainConfig
from mnist_dist.doctor.finding import Finding, from_message
from mnist_dist.doctor.probe import Outcome


def check_choices(config: TrainConfig, outcome: Outcome) -> list[Finding]:
    """A row for each choice; one that says why there are none."""
    told: dict[str, Any] | None = outcome.answers.get("choices")
    if told is None:
        return [Finding("strategy", "unknown", "TensorFlow did not answer, so the choices of auto are unknown")]
    if "error" in told:
        return [from_message("strategy", told["error"], fix="correct this key, or start the processes in another way")]
    findings = [_of("strategy", config.strategy.name, told["strategy"], told["reason"])]
    is_gpu = told["num_gpus"] > 0
    findings.append(
        _of(
            "precision", config.precision.name, told["precision"], "the GPU's compute capability" if is_gpu else "a CPU"
        )
    )
    why = "GPUs" if is_gpu else "CPUs, where it costs little" if told["reproducibility"] == "exact" else "few shards"
    findings.append(_of("reproducibility", config.reproducibility, told["reproducibility"], why))
    why = "fast mode on one GPU" if told["compile"] == "xla" else "XLA pays in fast mode on one GPU"
    findings.append(_of("compiler", config.compile, told["compile"], why))
    findings.append(_threads(told))
    advice = [from_message("settings", text.removeprefix("WARNING: "), status="warning") for text in told["warnings"]]
    return [
        *findings,
        *(Finding("settings", "warning", one.found, one.fix or "leave the key out") for one in advice[:1]),
    ]


def _of(name: str, asked: str, chosen: str, why: str) -> Finding:
    found = f"{chosen} ({why})" if asked == "auto" else f"{chosen} (as configured)"
    return Finding(name, "ok", found, facts={name: chosen})


def _threads(told: dict[str, Any]) -> Finding:
    found = f"{told['inter_op']} operation(s) in parallel, {told['intra_op']} thread(s) in each"
    why = f"{told['cores']} core(s), {told['num_shards']} shard(s) of this process"
    only = ", one thread each since exact" if told["reproducibility"] == "exact" else ""
    return Finding("threads", "ok", f"{found} ({why}{only})")


def check_configuration(config: TrainConfig) -> Finding:
    """The keys, which must be the same on all ranks."""
    names = {key.name for key in fields(TrainConfig)}  # not those of a command that has more
    keys = job_keys({key: value for key, value in asdict(config).items() if key in names})
    return Finding("configuration", "ok", f"{len(keys)} keys", facts=keys)
