"""Reading environment variables, which may have been set by anybody to anything."""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from mnist_dist.base.errors import UserError

T = TypeVar("T")

# More than the largest machines have; limits, so that a mistyped variable does not fill the memory.
MAX_PROCESSES = 100_000
MAX_CORES = 4_096
MAX_ID = 2**32 - 1
_MAX_SHOWN = 200


class Variables(dict[str, str]):
    """The environment variables that are set; an empty one counts as not set.

    All methods raise UserError, naming the variable.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__({name: value.strip() for name, value in environ.items() if value.strip()})

    def number(self, name: str, *, default: int = 0, minimum: int = 0, maximum: int = MAX_PROCESSES) -> int:
        """The value of a variable that must be a whole number, or the default if it is not set."""
        if name not in self:
            return default
        number = int(self[name]) if re.fullmatch("[0-9]{1,18}", self[name]) else -1
        if not minimum <= number <= maximum:
            raise UserError(
                f"{self.shown(name)}: must be a whole number from {minimum} to {maximum}; unset it, or start the "
                "processes with the launcher that sets it"
            )
        return number

    def parsed(self, name: str, parse: Callable[[str], T]) -> T:
        """What `parse` returns for a variable; its ValueError becomes a UserError that names the variable."""
        try:
            return parse(self[name])
        except ValueError as error:
            raise UserError(
                f"{self.shown(name)}: {error}; start the processes with the launcher that sets it"
            ) from error

    def check_complete(self, names: tuple[str, ...], *, given: str, launcher: str) -> None:
        """Raise UserError if one of `names` is not set, though `given` is."""
        missing = [name for name in names if name not in self]
        if missing:
            raise UserError(
                f"{self.shown(given)} is set but {', '.join(missing)} is not; start the job with {launcher}"
            )

    def shown(self, name: str) -> str:
        """NAME=VALUE, for a message."""
        return f"{name}={printable(self[name])}"


def printable(value: str, length: int = _MAX_SHOWN) -> str:
    """A value from outside, made safe for a message and cut to `length` characters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in value[:length])
    return shown + ("..." if len(value) > length else "")
