"""The type of an array whose element type does not matter."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
