"""All checks, in the order in which they run: the cheap and blaming ones first."""

from collections.abc import Callable

from mnist_dist.verify.checks.base import Check, Evidence
from mnist_dist.verify.checks.environment import Environment
from mnist_dist.verify.checks.identity import Identity
from mnist_dist.verify.checks.reference import Reference
from mnist_dist.verify.config import VerifyConfig
from mnist_dist.verify.context import Context


def choose_checks(
    config: VerifyConfig, *, start: Callable[[Context], None], reference: Callable[[], Evidence]
) -> list[Check]:
    """Those that the configuration names; `identity` always, since it starts the devices by `start`."""

    def start_and_load(context: Context) -> None:
        start(context)
        checks.extend(
            check
            for check in [*_with_tensorflow(), Reference(reference)]
            if config.checks is None or check.name in config.checks
        )

    checks: list[Check] = [Identity(start_and_load)]
    if config.checks is None or "environment" in config.checks:
        checks.insert(0, Environment())
    return checks


def _with_tensorflow() -> list[Check]:
    # Only once TensorFlow has been imported with our settings.
    from mnist_dist.verify.checks.collectives import Collectives
    from mnist_dist.verify.checks.cross_examination import CrossExamination
    from mnist_dist.verify.checks.data import Data
    from mnist_dist.verify.checks.equality import Exact, Fast
    from mnist_dist.verify.checks.interruption import Interruption
    from mnist_dist.verify.checks.learning import Learning, Precision
    from mnist_dist.verify.checks.speed import Scaling, SlowRank

    training: list[Check] = [Exact(), Fast(), Learning(), Precision(), Interruption()]
    return [Collectives(), Data(), CrossExamination(), *training, SlowRank(), Scaling()]
