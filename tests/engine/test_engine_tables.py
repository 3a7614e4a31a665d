"""The table printer of all commands."""

from cosmo.engine.base.tables import text_table


def test_columns_are_aligned():
    """Oracle: by hand. The first column to the left, the others to the right."""
    rows = [["", "b"], ["long", "1"], ["x", "123"]]
    assert text_table(rows) == "        b\nlong    1\nx     123"
    assert text_table(rows, left=(0, 1), indent=1) == "       b\n long  1\n x     123"


def test_cells_are_printed_as_they_are():
    """Property: no markup, no wrapping, however long."""
    cells = ["[bold]x[/bold]", ":smile:", "y" * 500]
    assert text_table([cells]) == "  ".join(cells)


def test_a_table_in_a_notebook_shows_nothing_itself(monkeypatch):
    """Oracle: the same text as elsewhere, and no call of IPython's display."""
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *given: shown.append(given))
    assert text_table([["a", "b"]]) == "a  b"
    assert shown == []
