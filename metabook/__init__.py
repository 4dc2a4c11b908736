"""metabook: meta-learning, from formula to running code."""

__version__ = "0.2.0.dev0"


def __getattr__(name: str):
    "`metabook.load` without paying for torch when only the version is asked for."
    if name == "load":
        from metabook.saving import load

        return load
    raise AttributeError(f"module 'metabook' has no attribute {name!r}")
