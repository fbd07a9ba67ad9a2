"""Exit codes, and the errors that lead to them.

Raise `UserError` wherever the cause is something the user can fix: it becomes one line and exit code 2.
"""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # stopped early on request, with a checkpoint
EXIT_LOST_PEER = 76  # another process of the job is gone; earlier checkpoints are kept
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C


class UserError(ValueError):
    """The user's input is wrong; the message names the key or file, its value and what to do."""


class TrainingFailed(RuntimeError):
    """Training cannot continue (for example a non-finite loss); the message says where and why."""


class Diverged(TrainingFailed):
    """The loss is no number any more; the same training would fail at the same step again."""


class OfTheEnvironment(Exception):
    """Mixed into an error whose cause is the machine, its software or network: the printed line names `doctor`."""


class EnvironmentProblem(OfTheEnvironment, UserError):
    """What the user asked for cannot start in this environment."""


class EnvironmentFailed(OfTheEnvironment, TrainingFailed):
    """Training cannot continue in this environment."""


class LostTouch(RuntimeError):
    """The processes of the job can no longer reach each other, and it is unknown which of them is gone."""
