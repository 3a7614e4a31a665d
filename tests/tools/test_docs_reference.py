"""The pages of the reference that follow from the code."""

import re

from tools import docs_reference


def test_each_verb_has_its_help_page():
    """Oracle: the tables of verbs; the flag of the chat's role."""
    for name, program in docs_reference.PROGRAMS.items():
        page = docs_reference.commands_page(name)
        assert [verb for verb in program.verbs if f"## {program.name} {verb}\n" not in page] == []
    assert "--role TEXT" in docs_reference.commands_page("cosmo")


def test_each_macro_has_a_row_with_default_and_comment():
    """Oracle: the lines of the gin files."""
    page = docs_reference.macros_page()
    for path in docs_reference.MACROS:
        text = (docs_reference.ROOT / path).read_text()
        for name in re.findall(r"^([A-Z][A-Z0-9_]*) = ", text, re.M):
            assert f"| `{name}` |" in page
    assert "| `TRAIN_STEPS` | `REQUIRED` | steps of INITIAL_CHECKPOINT_PATH count |" in page


def test_a_comment_of_whole_lines_begins_a_group():
    """Hand calculation: two groups; a comment above a binding belongs to none."""
    text = "# One.\nA = 1  # first\nB = 2\n\n# Two\n# lines.\nC = %A\n\n# Three.\nx.y:\n  z = %C\n"
    assert list(docs_reference.macro_groups(text)) == [
        ("One.", [("A", "1", "first"), ("B", "2", "")]),
        ("Two lines.", [("C", "%A", "")]),
        ("", []),
    ]
