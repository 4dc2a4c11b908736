"""JupyterLab, as a reader uses it: run all cells of a chapter, move a slider, see the figure change.

Where METABOOK_SITE is set, as in the continuous integration, a missing browser is an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import pytest
from notebooks import ROOT

MAKEFILE = ROOT / "Makefile"
CHROMIUM = shutil.which("chromium")
PATIENCE = 120_000  # milliseconds
SETTINGS = {  # no window about news over the notebook; every cell in the page, also out of sight
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(room: Path) -> dict[str, str]:
    """Settings of its own, so that nothing of the person who runs the test is read or changed."""
    home = room / "home"
    for name, said in SETTINGS.items():
        path = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(said)
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    own = {name: str(home / folder) for name, folder in folders.items()}
    others = ("MPLBACKEND", "METABOOK_FRAMES", "JUPYTER_TOKEN")
    kept = {k: v for k, v in os.environ.items() if k not in others}
    return {**kept, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def started(room: Path, *words: str) -> Iterator[str]:
    """JupyterLab with these words on its command line, reachable from this machine alone: its address."""
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", *words, "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.port_retries=0"]
    log = (room / "lab.log").open("w")
    server = subprocess.Popen(command, env=environment(room), stdout=log, stderr=log, cwd=room)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", server, room / "lab.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the chapter (it saves what it runs), without a token."""
    work = tmp_path / "nbs"
    work.mkdir()
    shutil.copy(ROOT / "nbs/A14_explore.ipynb", work)
    words = ["--ip=127.0.0.1", f"--ServerApp.root_dir={work}"]
    with started(tmp_path, *words, "--IdentityProvider.token=", "--ServerApp.password=") as address:
        yield f"{address}/lab/tree/A14_explore.ipynb?reset"


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers."""
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture
def tab():
    if not CHROMIUM and not os.environ.get("METABOOK_SITE"):
        pytest.skip("there is no chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(PATIENCE)
        yield opened
        browser.close()


# The kernel is there and waits, and no cell waits for it.
IDLE = """() => {
  const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")];
  return document.querySelector("#jp-main-statusbar").innerText.includes("| Idle")
    && document.querySelector(".jp-NotebookPanel [data-status]")?.dataset.status === "idle"
    && !prompts.some((prompt) => prompt.textContent.includes("*"));
}"""
SHOWN = "document.querySelector('.jp-OutputArea:has(.noUi-handle) img').src"


def run_all(tab, address: str) -> None:
    """Open the notebook and run every cell."""
    tab.goto(address)
    tab.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    tab.wait_for_function(IDLE)
    tab.click('.lm-MenuBar-itemLabel:text-is("Run")')
    tab.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    tab.wait_for_function(IDLE)


def test_a_slider_changes_its_figure(lab, tab):
    run_all(tab, lab)
    slider = tab.locator(".jp-OutputArea .noUi-handle")
    slider.first.wait_for(state="attached")
    figure = tab.locator(".jp-OutputArea:has(.noUi-handle)").first
    before, described = (figure.locator("img").get_attribute(key) for key in ("src", "alt"))
    slider.first.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function(f"(before) => {SHOWN} !== before", arg=before)
    assert figure.locator("img").get_attribute("alt") != described
    assert tab.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    prose = "".join(tab.locator(".jp-MarkdownOutput").all_inner_texts())
    assert "{cite" not in prose and "{eq}" not in prose  # MyST is read, not shown


def status(address: str, token: str = "") -> int:
    """What the server answers, with a token or without."""
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as reply:
            return reply.status
    except HTTPError as error:
        return error.code


def test_make_lab_lets_nobody_in_without_the_token(tmp_path):
    (words,) = re.findall(r"^\t\$\(BIN\)/python -m jupyterlab (.*)$", MAKEFILE.read_text(), re.M)
    (tmp_path / "nbs").mkdir()
    with started(tmp_path, *shlex.split(words)) as address:
        (about,) = (tmp_path / "home/runtime").glob("jpserver-*.json")
        server = json.loads(about.read_text())
        assert server["hostname"] in ("localhost", "127.0.0.1")  # not reachable from elsewhere
        assert len(server["token"]) >= 32
        for path in ("api/contents", "api/kernels", "api/terminals"):
            assert status(f"{address}/{path}") == status(f"{address}/{path}", "guessed") == 403
            assert status(f"{address}/{path}", server["token"]) == 200
