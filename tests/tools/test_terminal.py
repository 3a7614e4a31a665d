"""The picture of a terminal. Oracles: lines by hand, an XML parser, the drawing that is kept."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tests.conftest import ROOT
from tools import terminal

SVG = "{http://www.w3.org/2000/svg}"
RECORDING = json.loads((ROOT / "docs" / "figures" / "terminal.json").read_text())


def test_a_log_gives_the_pauses_of_its_clock():
    """Oracle: by hand; a line without a clock comes at once."""
    log = "12:00:58 step 1\nnoise\n12:01:03 step 2\nstep done\n"
    assert terminal.read_log(log, "step") == [
        [0, "12:00:58 step 1"],
        [5, "12:01:03 step 2"],
        [0, "step done"],
    ]


@pytest.mark.parametrize("theme", terminal.COLOURS)
def test_the_drawing_is_the_recordings(theme):
    """Oracle: the kept file; each line of the recording in its order, none from elsewhere."""
    drawn = terminal.draw(RECORDING, theme)
    assert (ROOT / "docs" / "images" / f"terminal-{theme}.svg").read_text() == drawn
    tree = ElementTree.fromstring(drawn)
    words = ["".join(text.itertext()) for text in tree.iter(f"{SVG}text")]
    parts = RECORDING["commands"]
    assert words == [
        line for part in parts for line in (f"$ {part['command']}", *(t for _, t in part["lines"]))
    ]
    assert tree.find(f"{SVG}title").text == RECORDING["about"]


def test_the_drawing_loads_nothing_and_rests_where_motion_is_unwelcome():
    """Oracle: no address but the namespace; lines are hidden only where motion is welcome."""
    drawn = terminal.draw(RECORDING, "light")
    assert drawn.count("http") == 1 and "url(" not in drawn and "href" not in drawn
    before, _, within = drawn.partition("@media (prefers-reduced-motion: no-preference)")
    assert "opacity" not in before and "opacity: 0" in within


def test_markup_in_a_line_is_text():
    """Oracle: an XML parser gives the line back."""
    recording = {"about": "a < b", "commands": [{"command": "x", "lines": [[0, "<b> & c"]]}]}
    tree = ElementTree.fromstring(terminal.draw(recording, "dark"))
    assert [*tree.iter(f"{SVG}text")][1].text == "<b> & c"
