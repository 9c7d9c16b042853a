"""Values of a receipt or a report as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null. Tensors and numpy become numbers and lists, tuples lists, keys
    text, and so does everything that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): strict(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(child) for child in value]
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
