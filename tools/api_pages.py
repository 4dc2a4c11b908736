"""A page of reference for each module of the library, from docstrings and the comments beside arguments."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

INDEX = """# Reference

Every name that the library exports, a page for each module. The code itself, with the formulas that it
follows, stands in the chapters.

| module | made in | holds |
|---|---|---|
{rows}

```{{toctree}}
:hidden:

{pages}
```
"""


def load(folder: Path) -> list[ModuleType]:
    """Import the modules that export something, in the order of their names."""
    names = [path.stem for path in sorted(folder.glob("[!_]*.py"))]
    modules = [importlib.import_module(f"{folder.name}.{name}") for name in names]
    return [module for module in modules if getattr(module, "__all__", None)]


def members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a module exports."""
    return ((name, getattr(module, name)) for name in module.__all__)


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class itself defines."""
    return (
        (n, m) for n, m in vars(cls).items() if n[0] != "_" and (callable(m) or is_descriptor(m))
    )


def is_descriptor(member: Any) -> bool:
    return isinstance(member, (property, classmethod, staticmethod))


def names(modules: list[ModuleType]) -> dict[str, str]:
    """Full names by what prose calls a thing; a name that two modules export is left out."""
    found: dict[str, list[str]] = {m.__name__: [m.__name__] for m in modules}
    for module in modules:
        for name, thing in members(module):
            full = f"{module.__name__}.{name}"
            found.setdefault(name, []).append(full)
            for method, _ in methods(thing) if inspect.isclass(thing) else ():
                found.setdefault(f"{name}.{method}", []).append(f"{full}.{method}")
    return {name: full[0] for name, full in found.items() if len(full) == 1}


def chapter_of(module: ModuleType) -> str | None:
    """The notebook that a module is made from, such as 08_maml."""
    found = re.search(r"^# %% \.\./nbs/(\w+)\.ipynb", inspect.getsource(module), re.M)
    return found and found[1]


def write(
    modules: list[ModuleType],  # what the library consists of
    folder: Path,  # where the pages go, made anew
    chapters: list[str],  # the chapters that pages can link
) -> None:
    """Write the reference: its first page and one for each module."""
    folder.mkdir()
    made = {
        module.__name__: chapter
        for module in modules
        if (chapter := chapter_of(module)) in chapters
    }
    (folder / "index.md").write_text(index(modules, made), encoding="utf-8")
    for module in modules:
        path = folder / f"{module.__name__.rpartition('.')[2]}.md"
        path.write_text(page(module, made.get(module.__name__)), encoding="utf-8")


def index(modules: list[ModuleType], made: dict[str, str]) -> str:
    """The first page of the reference."""
    rows = []
    for name in (module.__name__ for module in modules):
        chapter = f"[](../{made[name]}.ipynb)" if name in made else ""
        exported = ", ".join(f"{{py:obj}}`~{name}.{n}`" for n, _ in members(sys.modules[name]))
        rows.append(f"| {{py:mod}}`{name}` | {chapter} | {exported} |")
    pages = "\n".join(module.__name__.rpartition(".")[2] for module in modules)
    return INDEX.format(rows="\n".join(rows), pages=pages)


def page(module: ModuleType, chapter: str | None) -> str:
    """The page of one module."""
    lead = f"Made in the chapter [](../{chapter}.ipynb), where each name is explained and tested."
    parts = [
        f"# {module.__name__}",
        f"```{{py:module}} {module.__name__}\n```",
        lead if chapter else "",
    ]
    return "\n\n".join([*parts, *(entry(name, thing) for name, thing in members(module))]) + "\n"


def entry(name: str, thing: Any) -> str:
    """One exported name."""
    if inspect.isclass(thing):
        inner = "\n\n".join(method(n, m) for n, m in methods(thing))
        return directive(
            "class", name + signature(thing), describe(thing) + "\n\n" + inner, depth=5
        )
    if inspect.isroutine(thing):
        return directive("function", name + signature(thing), describe(thing))
    value = repr(thing).replace("typing.", "")
    return directive(
        "data", name, f":value: {value}" if len(value) < 80 and value[0] != "<" else ""
    )


def method(name: str, member: Any) -> str:
    """One method or property of a class."""
    if isinstance(member, property):
        return directive("property", name, inspect.getdoc(member) or "")
    flag = f":{type(member).__name__}:\n\n" if is_descriptor(member) else ""
    function = getattr(member, "__func__", member)
    bound = not isinstance(member, staticmethod)
    return directive("method", name + signature(function, bound), flag + describe(function))


def directive(kind: str, head: str, body: str, depth: int = 4) -> str:
    """A block of Sphinx's Python domain; `depth` colons, more around other blocks."""
    fence = ":" * depth
    body = body.strip()
    fields = body.startswith((":param", ":returns"))
    gap = "\n" if fields else ""  # right after the head Sphinx would read them as options
    return f"{fence}{{py:{kind}}} {head}\n{gap}{body}\n{fence}"


def arguments(thing: Any) -> inspect.Signature:
    """The signature; an exception class of Python's own kind has none to read."""
    try:
        return inspect.signature(thing)
    except ValueError:
        return inspect.Signature()


def signature(thing: Any, bound: bool = False) -> str:
    """The arguments and what is returned, as Sphinx reads them."""
    found = arguments(thing)
    kept = list(found.parameters.values())[bound:]
    shown = [p.replace(annotation=written(p.annotation), default=shown_default(p)) for p in kept]
    returns = (
        inspect.Signature.empty if inspect.isclass(thing) else written(found.return_annotation)
    )
    return str(found.replace(parameters=shown, return_annotation=returns))


class Written:
    """Text that stands for itself in a signature."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def written(annotation: Any) -> Any:
    """An annotation as its author wrote it."""
    if annotation is inspect.Signature.empty:
        return annotation
    annotation = getattr(annotation, "__forward_arg__", annotation)
    named = inspect.isclass(annotation) and not hasattr(annotation, "__args__")
    return Written(annotation.__name__ if named else str(annotation).replace("typing.", ""))


def shown_default(parameter: inspect.Parameter) -> Any:
    """A default by its name, or as `...`, where its representation is no Python."""
    value = parameter.default
    if value is inspect.Parameter.empty or "<" not in repr(value):
        return value
    return Written(getattr(value, "__name__", "..."))


def describe(thing: Any) -> str:
    """The docstring, then a line for each argument with a comment beside it."""
    made = vars(thing).get("__init__") if inspect.isclass(thing) else None
    if is_dataclass(thing):
        made = None  # a generated one: the class itself lists the arguments
    source = inspect.getsource(made or thing)
    doc = (
        inspect.cleandoc(thing.__doc__ or "")
        + "\n\n"
        + inspect.cleandoc((made and made.__doc__) or "")
    )
    fields = [
        f":param {name}: {escaped(comment)}"
        for name in arguments(thing).parameters
        if (comment := comment_beside(rf"\*{{0,2}}{name}\s*[:=,]", source))
    ]
    if not inspect.isclass(thing) and (comment := comment_beside(r"\)\s*->", source)):
        fields.append(f":returns: {escaped(comment)}")
    return escaped(doc.strip()) + "\n\n" + "\n".join(fields)


def comment_beside(start: str, source: str) -> str | None:
    """The comment at the end of the first line that starts so."""
    found = re.search(rf"^\s*{start}.*?\s#\s*(.+)$", source, re.M)
    return found and found[1].strip()


def escaped(text: str) -> str:
    """Keep `<` out of HTML's hands, except in code."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    return "".join(p if n % 2 else p.replace("<", r"\<") for n, p in enumerate(parts))
