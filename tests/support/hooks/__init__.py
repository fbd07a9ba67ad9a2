"""Scripts that run in place of `-m mnist_dist.train`, and how they are told what to do."""

import dataclasses
import json
from pathlib import Path

HOOKS = Path(__file__).parent
WRITE_HOOK = (HOOKS / "write_hook.py",)


@dataclasses.dataclass(frozen=True)
class WriteHook:
    """A moment in the writing of a file at which a process is killed, or held until it is released."""

    file: str
    moment: float | str
    """The part of its content that has been written, from 0 to 1 (all of it); or "flushed", or "renamed"."""
    number: int = 1
    """Which time that the file is written."""
    signs: Path | None = None
    """A folder: hold the process in place of killing it. A file `held` appears there, and a file `go` lets it go."""

    @property
    def is_held(self) -> bool:
        return (self.signs / "held").exists()

    def release(self) -> None:
        (self.signs / "go").touch()

    def environment(self) -> dict[str, str]:
        fields = dataclasses.asdict(self) | {"signs": str(self.signs) if self.signs else ""}
        return {"WRITE_HOOK": json.dumps(fields)}
