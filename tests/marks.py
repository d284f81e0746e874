"""Which of a test's parameters `make quick` runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values for `parametrize`, of which all but some are slow."""
    return [v if v in kept else pytest.param(v, marks=pytest.mark.slow) for v in values]
