"""The site: how it is built out of notebooks, and every page of it in a browser.

The pages are those of METABOOK_SITE, where that is set (then a missing browser or site is an error), or those of
_site/ after `make book`; where there is neither, a small site is built out of the two notebooks below.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import build_site
import chapter_pages
import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebooks import ROOT

ASKED = os.environ.get("METABOOK_SITE")
CHROMIUM = shutil.which("chromium")
PHONE, DESKTOP = 390, 1280

SMALL = {
    "01_learning_to_learn": [
        "# Learning to learn\n\nA {term}`support set` and {cite:t}`finn2017maml`.\n\n## Inner\n\n"
        "$$\n\\theta' = \\theta - \\alpha g\n$$ (eq-step)\n\nIn {eq}`eq-step`, {numref}`fig-line`, `Explore`.\n\n"
        "$$\n" + " + ".join("abcdefghijklmnopqrstuvwxyz" * 2) + "\n$$ (def-wide)\n\n"
        "| " + " | ".join(["a wide column"] * 12) + " |\n" + "|---" * 12 + "|\n",
        "#| setup\nimport matplotlib.pyplot as plt",
        '#| label: fig-line\n#| fig-cap: "A line."\n#| fig-alt: "A rising line."\nplt.plot([1, 2])\nplt.show()',
        '#| test: sum\n#| proves: eq-step\n#| breaks: "a" -> "b"\nprint("x" * 300)\nassert 1 + 1 == 2',
        "#| checks\n#| test: folded\nassert 2 + 2 == 4",
        "print('after the checks')",
        "#| slow\nraise RuntimeError('a slow cell is not for pages')",
    ],
    "A14_explore": [
        "# Figures with sliders\n\nSee [](01_learning_to_learn.ipynb).",
        "import matplotlib.pyplot as plt\n\nfrom metabook.explore import Explore",
        'def dot(x, y):\n    """A dot at {x}, {y}."""\n    fig, ax = plt.subplots(figsize=(2, 2))\n'
        "    ax.plot([x], [y], 'o')\n    ax.set(xlim=(0, 3), ylim=(0, 3))\n    return fig\n\n\n"
        "Explore(dot, x=[0, 1, 2], y=[1, 2])",
    ],
}


def notebook(*sources: str) -> nbformat.NotebookNode:
    """The first cell and cells that begin with # are markdown."""
    make = [new_markdown_cell if s.startswith("# ") else new_code_cell for s in sources]
    return new_notebook(
        cells=[m(s, id=f"cell{n}") for n, (m, s) in enumerate(zip(make, sources, strict=True))]
    )


def chapter(folder: Path, *sources: str, name: str = "01_small") -> build_site.Chapter:
    """A chapter with these cells, as the builder reads it."""
    nbformat.write(notebook("# Small", *sources), folder / f"{name}.ipynb")
    return build_site.read(folder / f"{name}.ipynb")


def executed(folder: Path, *sources: str) -> list[list[nbformat.NotebookNode]]:
    """What the code cells of a chapter give."""
    return [cell.outputs for cell in build_site.execute(chapter(folder, *sources), 1).code]


def page(
    *cells: nbformat.NotebookNode, skipped: dict[str, str] | None = None
) -> list[nbformat.NotebookNode]:
    """The cells of a page."""
    book = new_notebook(cells=[new_markdown_cell("# Small"), *cells])
    names = {"Explore": "metabook.explore.Explore", "show": "metabook.training.show"}
    return chapter_pages.page("01_small", book, skipped or {}, names, 0.0).cells


# --- from notebooks to pages


def test_a_failing_cell_is_named_and_nothing_is_kept(tmp_path):
    failing = [chapter(tmp_path, "x = 1", "x / 0")]
    (failure,) = build_site.execute_all(failing, tmp_path / "build", jobs=1)
    assert "01_small, cell cell2 (x / 0)" in failure
    assert "ZeroDivisionError" in failure
    assert not (tmp_path / "build").exists()


def test_only_a_change_of_code_or_library_executes_a_chapter_again(tmp_path, monkeypatch):
    first = chapter(tmp_path, "print('once')")
    build_site.execute_all([first], tmp_path / "build", jobs=1)
    again = chapter(tmp_path, "# A new sentence\n", "print('once')")
    assert again.key == first.key
    same = chapter(tmp_path, "print('once')")
    assert build_site.recall(same, tmp_path / "build", stale=False)
    assert same.code[0].outputs[0].text == "once\n"

    other = chapter(tmp_path, "print('twice')")
    assert not build_site.recall(other, tmp_path / "build", stale=False)
    assert build_site.recall(other, tmp_path / "build", stale=True)  # `--only` of another chapter

    monkeypatch.setattr(build_site, "LIBRARY", tmp_path)
    code = "from metabook.one import f"
    (tmp_path / "one.py").write_text("from metabook.two import f")
    (tmp_path / "two.py").write_text("f = 1")
    (tmp_path / "three.py").write_text("f = 3")
    before = chapter(tmp_path, code).key
    (tmp_path / "three.py").write_text("f = 4")
    assert chapter(tmp_path, code).key == before
    (tmp_path / "two.py").write_text("f = 2")
    assert chapter(tmp_path, code).key != before


def test_cells_that_cannot_run_here_are_left_out_and_say_why(tmp_path, monkeypatch):
    monkeypatch.delenv("METABOOK_DATA", raising=False)
    cells = ["#| slow\n1 / 0", "#| data: omniglot\n1 / 0", "#| eval: false\n1 / 0", "print(1)"]
    read = chapter(tmp_path, *cells)
    assert list(read.skipped) == ["cell1", "cell2", "cell3"]
    assert read.skipped["cell2"] == "it needs the data set omniglot"
    assert [len(cell.outputs) for cell in build_site.execute(read, 1).code] == [0, 0, 0, 1]
    note = page(new_code_cell("#| slow\n1 / 0", id="a"), skipped={"a": "it takes too long"})[-1]
    assert "Not run on this page: it takes too long." in note.source


def test_a_chapter_has_the_library_of_this_checkout_and_frames_for_pages(tmp_path):
    code = "import os, metabook\nprint(os.environ['METABOOK_FRAMES'], metabook.__file__)"
    ((output,),) = executed(tmp_path, code)
    assert output.text == f"1 {ROOT / 'metabook' / '__init__.py'}\n"


def test_outputs_are_tidied():
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Bar()"}
    outputs = [
        new_output("stream", name="stdout", text="a\n"),
        new_output("stream", name="stdout", text=" 10%\r 50%\r100%\nb\n"),
        new_output("display_data", data=widget),
        new_output("stream", name="stderr", text="\r"),
    ]
    (stream,) = build_site.tidy(outputs)
    assert stream.text == "a\n100%\nb\n"


def test_a_figure_without_alternative_text_is_refused():
    png = new_output("display_data", data={"image/png": "", "text/plain": ""})
    html = new_output("display_data", data={"text/html": "<p><img src='x'></p>"})
    for output in (png, html):
        with pytest.raises(chapter_pages.PageError, match=r"cell a \(draw\(\)\).*alternative text"):
            page(new_code_cell("draw()", id="a", outputs=[output]))
    with pytest.raises(chapter_pages.PageError, match="alternative text"):
        page(new_markdown_cell("![](x.png)"))
    with pytest.raises(chapter_pages.PageError, match="fig-cap"):
        page(new_code_cell("#| label: fig-a\ndraw()"))


def test_directives_become_tags_and_notes():
    cell, note = page(
        new_code_cell(
            '#| test: t\n#| proves: eq-a\n#| breaks: "x \\"y\\"" -> ""\n#| code-fold: true\nassert x'
        )
    )[1:]
    assert cell.source == "assert x"
    assert cell.metadata.tags == ["hide-input", "test"]
    assert 'Proves {eq}`eq-a` (`t`); fails if `` x "y" `` becomes nothing.' in note.source
    sized = new_output(
        "display_data", data={"image/png": ""}, metadata={"image/png": {"width": 300}}
    )
    (cell,) = page(
        new_code_cell('#| fig-alt: "Two dots"\n#| fig-cap: "Dots."\ndraw()', outputs=[sized])
    )[1:]
    assert cell.metadata.mystnb == {
        "image": {"alt": "Two dots", "width": "300px"},
        "figure": {"caption": "Dots."},
        "code_prompt_show": "The figure's code",
        "code_prompt_hide": "The figure's code",
    }
    assert page(new_code_cell("#| default_exp maml"))[1:] == []
    assert page(new_code_cell("#| hide\nx = 1"))[1].metadata.tags == ["remove-cell"]
    assert page(new_code_cell("import a\n\ntry:\n    import b\nexcept ImportError:\n    pass"))[
        1
    ].metadata.tags == ["hide-input"]


def test_names_of_the_library_are_linked_where_they_are_meant():
    names = {"Explore": "metabook.explore.Explore", "fit": "metabook.training.fit"}
    link = functools.partial(chapter_pages.link_names, names=names)
    assert link("`Explore` and `fit()`") == (
        "{py:obj}`Explore <metabook.explore.Explore>` and {py:obj}`fit() <metabook.training.fit>`"
    )
    for kept in (
        "{term}`Explore`",
        "`Explorer`",
        "# `Explore`",
        "```\n`Explore`\n```",
        "[`Explore`](x.md)",
    ):
        assert link(kept) == kept
    code = ["#| default_exp training", "from metabook.explore import Explore"]
    assert (
        chapter_pages.linkable({"show": "metabook.maml.show", **names}, "training", code) == names
    )


# --- the pages in a browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


def build(nbs: Path, out: Path) -> Path:
    """Build the small site."""
    nbs.mkdir()
    for name, sources in SMALL.items():
        nbformat.write(notebook(*sources), nbs / f"{name}.ipynb")
    command = [sys.executable, ROOT / "tools/build_site.py", "--nbs", nbs, "--site", out / "_site"]
    done = subprocess.run([*command, "--build", out / "_build"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "_site"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    found = Path(ASKED).resolve() if ASKED else ROOT / "_site"
    if not ASKED and not (found / "index.html").exists():
        found = build(folder / "nbs", folder)
    assert (found / "index.html").exists(), f"there is no site in {found}: run `make book`"
    return found


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM and not ASKED:
        pytest.skip("there is no chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.fixture
def tab(browser, address):
    """A page that notes in `tab.problems` what goes wrong on it."""
    opened = browser.new_page(viewport={"width": DESKTOP, "height": 900})
    opened.problems = []
    note = opened.problems.append
    opened.on("pageerror", lambda error: note(f"error {error}"))
    opened.on(
        "console", lambda said: note(f"console {said.text}") if said.type == "error" else None
    )
    # A request that was under way when the test left the page is cancelled by the browser: no fault.
    opened.on(
        "requestfailed",
        lambda request: request.failure == "net::ERR_ABORTED" or note(f"failed {request.url}"),
    )
    opened.on(
        "response",
        lambda reply: note(f"{reply.status} {reply.url}") if reply.status >= 400 else None,
    )
    opened.on(
        "request",
        lambda asked: note(f"external {asked.url}") if external(asked.url, address) else None,
    )
    yield opened
    opened.close()


def external(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def pages(site: Path) -> list[str]:
    """Every page that is read: at an old address there is only a line that leads on."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    moved = (build_site.ROOT / "docs" / "moved.txt").read_text(encoding="utf-8").splitlines()
    old = tuple(f"{line.split()[0]}.html" for line in moved if not line.startswith("#"))
    return [n for n in found if not n.startswith(("_static/", "_sources/")) and n not in old]


LOOK = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const formulas = document.querySelectorAll("span.math, div.math").length;
  const found = (selector) => document.querySelectorAll(selector).length;
  return {
    "formulas that are not typeset": found("mjx-container") < formulas,
    "formulas with an error": found("mjx-merror, [data-mjx-error]") > 0,
    "images without a description": found("img:not([alt]), article img[alt='']") > 0,
    "images that do not load": [...document.images].some((i) => i.complete && !i.naturalWidth),
  };
}"""
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def test_every_page_is_whole_at_both_widths(site, address, tab):
    for name in pages(site):
        tab.set_viewport_size({"width": DESKTOP, "height": 900})
        tab.goto(address + name, wait_until="load")
        tab.problems += [f"{what} on {name}" for what, found in tab.evaluate(LOOK).items() if found]
        for width in (DESKTOP, PHONE):
            tab.set_viewport_size({"width": width, "height": 844})
            if tab.evaluate(WIDER):
                tab.problems.append(f"{name} scrolls sideways at {width} pixels")
    assert "\n".join(tab.problems) == ""


def test_checks_stand_in_one_fold_at_the_end_of_their_section(site):
    (page,) = (
        site.glob("08_maml.html")
        if (site / "08_maml.html").exists()
        else site.glob("01_learning_to_learn.html")
    )
    folds = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select(
        "details.metabook-fold"
    )
    for fold in folds:
        (said,) = fold.find("summary").stripped_strings
        cells = len(fold.select("div.cell"))
        assert said == (f"Checks ({cells})" if cells else "Details")
        after = [tag.name for tag in fold.find_next_siblings() if tag.get_text(strip=True)]
        assert set(after) <= {"section"}
    assert folds


def test_sliders_move_by_keyboard(site, address, tab):
    with_sliders = [
        name for name in pages(site) if "metabook-explore" in (site / name).read_text("utf-8")
    ]
    assert with_sliders
    for name in with_sliders:
        tab.goto(address + name)
        tab.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
        for figure in tab.locator(".metabook-explore").all():
            shown = {figure.locator("img").get_attribute("src")}
            for slider in figure.locator("input[type=range]").all():
                slider.focus()
                tab.keyboard.press("End")
                shown.add(figure.locator("img").get_attribute("src"))
                texts = slider.evaluate("e => JSON.parse(e.dataset.texts)")
                assert slider.get_attribute("aria-valuetext") == texts[-1], name
                assert slider.evaluate("e => e.parentElement.innerText").endswith(texts[-1]), name
                tab.keyboard.press("ArrowLeft")
                assert slider.get_attribute("aria-valuetext") == texts[max(len(texts) - 2, 0)], name
            assert len(shown) > 1, f"no slider of a figure on {name} changes it"
    assert "\n".join(tab.problems) == ""


def test_search_finds_a_word(address, tab):
    tab.goto(f"{address}search.html?q=prototype")
    tab.locator("#search-results li").first.wait_for()
    assert "Glossary" in tab.locator("#search-results").inner_text()
    assert "\n".join(tab.problems) == ""


def test_the_dark_mode_is_a_click_away_and_remembered(address, tab):
    tab.goto(address)
    colours = set()
    for mode in ("light", "dark"):
        tab.locator(".theme-switch-button:visible").click()
        tab.locator(f".theme-change-button[data-mode={mode}]:visible").click()
        assert tab.evaluate("document.documentElement.dataset.theme") == mode
        colours.add(tab.evaluate("getComputedStyle(document.body).color"))
    assert len(colours) == 2
    tab.goto(address + "glossary.html")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def parsed(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


@pytest.fixture(scope="module")
def soups(site) -> dict[str, BeautifulSoup]:
    """Every page, parsed once."""
    return {name: parsed((site / name).read_text("utf-8")) for name in pages(site)}


@pytest.mark.xdist_group("soups")
def test_every_link_within_the_site_leads_somewhere(site, soups):
    targets = {name: {tag["id"] for tag in soup.find_all(id=True)} for name, soup in soups.items()}
    broken = []
    for name, soup in soups.items():
        for link in soup.find_all("a", href=True):
            path, fragment = urldefrag(urljoin(f"site:///{name}", link["href"]))
            if not path.startswith("site:///"):
                continue
            there = unquote(path.removeprefix("site:///")) or "index.html"
            if not (site / there).is_file() or (
                fragment and unquote(fragment) not in targets.get(there, {fragment})
            ):
                broken.append(f"{name}: {link['href']}")
    assert broken == []


# How the scripts begin that the theme and Sphinx's extensions write into a page.
THEIR = re.compile(
    r"document\.documentElement\.dataset\.mode =|DOCUMENTATION_OPTIONS\.|let toggle"
    r"|var togglebuttonSelector =|// Activate the search field"
)


def scripts(page: BeautifulSoup) -> Iterator[str]:
    """Scripts of a page that lie elsewhere, stand in a tag, or stand in the page and are not the theme's."""
    for tag in page.find_all(True):
        yield from (f"{key} of {tag.name}" for key in tag.attrs if key.lower().startswith("on"))
        for key in ("src", "href", "action"):
            address = tag.get(key, "").strip().lower()
            loaded = tag.name != "a" and address.startswith(("http:", "https:", "//"))
            if loaded or address.startswith("javascript:"):
                yield f"{key} of {tag.name}: {address}"
        written = tag.name == "script" and not tag.get("src")
        if written and tag.get("type") != "application/json" and not THEIR.match(tag.text.strip()):
            yield f"script: {tag.text.strip()[:60]}"


@pytest.mark.xdist_group("soups")
def test_pages_hold_no_script_from_elsewhere_and_no_handler_in_a_tag(soups):
    found = {name: list(scripts(page)) for name, page in soups.items()}
    assert {name: those for name, those in found.items() if those} == {}


@pytest.mark.parametrize(
    "html",
    [
        "<button onclick='print()'>",
        "<img src='x.png' alt='' onError='f()'>",
        "<script src='https://cdn.example/x.js'></script>",
        "<script src='//cdn.example/x.js'></script>",
        "<link rel='stylesheet' href='http://cdn.example/x.css'>",
        "<a href='javascript:f()'>",
        "<script>fetch('https://example.org')</script>",
    ],
)
def test_a_script_that_should_not_be_there_is_found(html):
    assert len(list(scripts(parsed(html)))) == 1
    allowed = "<script src='_static/x.js'></script><script type='application/json'>{}</script>"
    assert not list(scripts(parsed(f"{allowed}<a href='https://example.org'>there</a>")))


def test_a_page_offers_its_notebook_as_it_was_written(site):
    originals = {path.name: path for path in (ROOT / "nbs").glob("*.ipynb")} if ASKED else {}
    offered = list((site / "_sources").glob("*.ipynb"))
    assert offered
    for path in offered:
        book = nbformat.read(path, as_version=4)
        assert not any(cell.get("outputs") for cell in book.cells), f"{path.name} holds outputs"
        same = path.read_bytes() == originals.get(path.name, path).read_bytes()
        assert same, f"{path.name} has changed since the site was built"
        assert f"_sources/{path.name}" in (site / f"{path.stem}.html").read_text("utf-8")


def test_old_addresses_lead_on(tmp_path):
    build_site.lead_on("# a comment\n13_prototypes 04_prototypes\n", tmp_path)
    [page] = tmp_path.iterdir()
    assert page.name == "13_prototypes.html" and "url=04_prototypes.html" in page.read_text()
    moved = (build_site.ROOT / "docs" / "moved.txt").read_text().splitlines()
    old, new = zip(*(line.split() for line in moved if not line.startswith("#")), strict=True)
    chapters = {path.stem for path in (build_site.ROOT / "nbs").glob("*.ipynb")}
    assert set(new) <= chapters and not set(old) & chapters
