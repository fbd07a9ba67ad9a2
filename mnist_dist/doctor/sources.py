"""Where the checks look: the real ones for the command, and others for the tests."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.launch.variables import Variables


@dataclass(frozen=True)
class Sources:
    """The environment variables and the folders in which Linux tells about a machine."""

    variables: Mapping[str, str]
    """All that are set; the probes' processes get these."""
    proc: Path = Path("/proc")
    cgroups: Path = Path("/sys/fs/cgroup")
    dev: Path = Path("/dev")

    @classmethod
    def of_this_process(cls) -> "Sources":
        """Those of the machine that this runs on."""
        return cls(dict(os.environ))

    @property
    def settings(self) -> Variables:
        """The variables that are set to something."""
        return Variables(self.variables)

    def program(self, name: str) -> str | None:
        """The path of a program; None if there is none."""
        return shutil.which(name, path=self.settings.get("PATH"))
