"""Build metadata comes from settings.ini (the nbdev 2 layout); pyproject.toml names the build backend and tools."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    # Said, so that an editable install puts this folder on Python's path.  It would leave a finder otherwise, which
    # Python asks last: in the folder above a clone it finds the clone itself first, a package without contents.
    package_dir={"": "."},
    python_requires=">=" + cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "dev": shlex.split(cfg["dev_requirements"]),
        "bench": shlex.split(cfg["bench_requirements"]),
        "fuzz": shlex.split(cfg["fuzz_requirements"]),
    },
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
