"""Build the wheel, install it with its runtime requirements alone, and use it from another folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

USE = """
import importlib.util, pkgutil, torch, metabook
for module in pkgutil.iter_modules(metabook.__path__):
    __import__(f"metabook.{module.name}") if module.name != "__main__" else None
authoring = [n for n in ("nbdev", "sphinx", "jupyterlab", "pytest") if importlib.util.find_spec(n)]
assert not authoring, f"the wheel brought {authoring}"
from metabook.episodes import Sinusoids
from metabook.maml import MAML
from metabook.networks import MLP
from metabook.scores import evaluate
from metabook.training import fit
learner = MAML(MLP([1, 8, 1]), lr=0.01, kind="regression")
fit(learner, Sinusoids(), steps=3, folder="run", progress=False)
print(metabook.__version__, evaluate(metabook.load("run"), Sinusoids(), n=10))
"""


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", work, root)
        (wheel,) = work.glob("*.whl")
        venv.create(work / "env", with_pip=True)
        python = work / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel)
        run(python, "-c", USE, cwd=work)
        run(work / "env" / "bin" / "metabook", "methods", cwd=work)
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KB, imports and works on its own")


def run(*command: object, cwd: Path | None = None) -> None:
    "Run a command; its failure is ours."
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


if __name__ == "__main__":
    main()
