"""Made from nbs/A14_explore.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

from __future__ import annotations

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from metabook.explore import Explore, style


def cell_567d6182():
    # cell 567d6182
    style()


def cell_1dde32f8():
    # cell 1dde32f8
    def wave(height, shift):
        """A sine wave of height {height}, shifted by {shift}."""
        fig, ax = plt.subplots(figsize=(4, 2))
        x = np.linspace(0, 2 * np.pi, 80)
        ax.plot(x, height * np.sin(x + shift))
        ax.set(ylim=(-3.2, 3.2), xlabel="$x$", ylabel="$y$")
        return fig

    waves = Explore(wave, height=[1, 2, 3], shift=[0.0, 0.5, 1.0, 1.5])
    return wave, waves


def test_style_is_set_for_every_later_figure():
    cell_567d6182()
    # cell 1f07e6fa
    fig, ax = plt.subplots(figsize=(5, 1.6))
    for n in range(7):
        ax.plot([0, 1], [-n, -n], linewidth=8)
    ax.set_axis_off()
    plt.show()
    # cell 1fbb51ab
    style()
    fig, ax = plt.subplots()
    lines = [ax.plot([n])[0].get_color() for n in range(7)]
    plt.close(fig)
    assert len(set(lines)) == 7
    assert tuple(fig.get_size_inches()) == (5.0, 3.2)


@pytest.mark.proves("eq-explore-frame")
def test_frames_stand_in_the_order_of_the_formula():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell 94256d06
    frames = waves.frames()
    sizes = [len(values) for values in waves.grids.values()]
    assert len(frames) == 3 * 4

    for places in [(0, 0), (0, 3), (1, 0), (2, 3)]:
        number = sum(i * int(np.prod(sizes[k + 1 :])) for k, i in enumerate(places))
        assert frames[number] == waves.frame(*places)

    assert frames[11].alt == "A sine wave of height 3, shifted by 1.5."


def test_every_frame_is_described():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell 8cd03ade
    alts = [
        frame.alt
        for frame in Explore(wave, alt="Height {height}", height=[1, 2], shift=[0]).frames()
    ]
    assert alts == ["Height 1", "Height 2"]
    with pytest.raises(ValueError, match="no alternative text"):
        Explore(lambda n: None, n=[1])
    with pytest.raises(ValueError, match="'hight'"):
        Explore(wave, alt="Height {hight}", height=[1], shift=[0])


def test_a_function_is_called_once_for_each_frame():
    cell_567d6182()
    # cell a9752dc4
    calls = []

    def counted(height):
        """A point at {height}."""
        calls.append(height)
        fig, ax = plt.subplots(figsize=(1, 1))
        ax.plot([0], [height], "o")
        return fig

    points = Explore(counted, height=[1, 2, 3])
    assert calls == []  # nothing is drawn before somebody looks
    points.frames(), points.html(), points.live()
    assert calls == [1, 2, 3]
    assert plt.get_fignums() == []  # every figure is closed again


def test_the_live_face_shows_the_frame_of_its_sliders():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell 4a759b73
    live = waves.live()
    *sliders, picture = live.children
    assert [slider.description for slider in sliders] == ["height", "shift"]
    sliders[0].index, sliders[1].index = 2, 3
    assert waves.frame(2, 3).image in picture.value
    assert 'alt="A sine wave of height 3, shifted by 1.5."' in picture.value


def test_the_page_holds_every_frame_once():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell c6b3ee41
    page = waves.html()
    data = json.loads(re.search(r'json">(.*)</script>', page)[1])
    images = [re.search(r'src="([^"]*)"', page)[1], *data["images"]]
    assert [images[number] for number, _ in data["frames"]] == [f.image for f in waves.frames()]

    flat = Explore(wave, height=[0], shift=[0.0, 1.0, 2.0])  # three times the same figure
    assert json.loads(re.search(r'json">(.*)</script>', flat.html())[1])["images"] == []


def test_a_page_is_usable_without_a_mouse_and_small():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell e2aad91f
    page = waves.html()
    assert page.count('<input type="range"') == 2  # the browser's own sliders know the arrow keys
    assert 'aria-label="height"' in page and 'aria-valuetext="1"' in page
    assert "onclick" not in page and "<script>" not in page  # no code in the page
    assert len(page) < 12 * 20_000


def test_jupyter_gets_a_widget_and_a_page_gets_html():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell d7e19055
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("METABOOK_FRAMES", raising=False)
        assert "application/vnd.jupyter.widget-view+json" in waves._repr_mimebundle_()
        patch.setenv("METABOOK_FRAMES", "1")
        assert waves._repr_mimebundle_()["text/html"] == waves.html()


def test_mistakes_are_named():
    cell_567d6182()
    wave, waves = cell_1dde32f8()
    # cell 07b03fa1
    mistakes = {
        "no grid": {},
        "'height' is empty": {"height": [], "shift": [0]},
        "'height' is 2: expected a list": {"height": 2, "shift": [0]},
        r"takes \(height, shift\): .*'shift'": {"height": [1]},
        r"takes \(height, shift\): .*'width'": {"height": [1], "shift": [0], "width": [1]},
        "10 height x 9 shift = 90 frames, at most 80": {"height": range(10), "shift": range(9)},
    }
    for message, grids in mistakes.items():
        with pytest.raises((TypeError, ValueError), match=message):
            Explore(wave, **grids)


def test_a_function_must_return_its_figure():
    cell_567d6182()

    # cell 039bac06
    def forgetful(n):
        """A line."""
        plt.plot([n])

    with pytest.raises(TypeError, match="returned None: expected a matplotlib figure"):
        Explore(forgetful, n=[1]).frames()
    plt.close("all")
