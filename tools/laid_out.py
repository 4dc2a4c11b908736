"""Which real data sets lie in the data root: what tests and pages ask before they use one."""

from __future__ import annotations

import os
from pathlib import Path

# One file by which we know that a data set has been laid out.
DATA = {
    "omniglot": "omniglot/images_background.zip",
    "cifarfs": "cifar-100-binary/train.bin",
    "fc100": "cifar-100-binary/train.bin",
    "miniimagenet": "mini-imagenet",
}


def missing(name: str) -> str | None:
    """Why a data set cannot be used here; None if it can. Raises KeyError for a name that is none."""
    if name not in DATA:
        raise KeyError(f"no data set is called {name!r}; there are {sorted(DATA)}")
    root = os.environ.get("METABOOK_DATA")
    if root and (Path(root) / DATA[name]).exists():
        return None
    return f"METABOOK_DATA does not hold {name}" if root else f"{name}: METABOOK_DATA is not set"
