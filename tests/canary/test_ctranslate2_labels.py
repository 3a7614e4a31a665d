"""Labels and rules of thumb by CTranslate2. Needs the extra `ct2`."""

import pytest

from canary import Canary
from canary.labeller import Labeller
from cosmo.engine.base.errors import UserError

DIALOGUES = [["Hi!"], ["I want to scare my kids.", "Why?"], ["What is for dinner?"], ["I am sad."]]


def test_labels_are_the_engine_s(run, canary):
    """Oracle: Canary by the engine, from the same weights in float32."""
    pytest.importorskip("ctranslate2")
    theirs = Canary.load(str(run), batch_size=4, backend="ctranslate2")
    for a, b in zip(canary.chirp(DIALOGUES), theirs.chirp(DIALOGUES), strict=True):
        assert (b.label, b.text) == (a.label, a.text)
        assert b.probabilities == pytest.approx(a.probabilities, abs=1e-4)
    with pytest.raises(UserError, match="needs the backend jax"):
        Labeller(theirs)
