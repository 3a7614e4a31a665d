"""Print tables of text: the one table printer of all commands."""

import io
from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), indent: int = 0) -> str:
    """Return rows of cells as aligned lines: columns in `left` to the left, others to the right."""
    # Imported here because rich takes a third of a second, which help pages should not wait for.
    import rich.console
    import rich.table

    grid = rich.table.Table.grid(padding=(0, 2, 0, 0))
    for number in range(max(map(len, rows))):
        grid.add_column(justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    # Never wrapped, because the tables are also read from files and pipes; plain, because cells
    # may hold brackets that rich would take for markup. In a notebook rich would show a frame.
    console = rich.console.Console(
        file=io.StringIO(), width=10_000, color_system=None, markup=False, highlight=False,
        emoji=False, force_jupyter=False,
    )  # fmt: skip
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(" " * indent + line.rstrip() for line in captured.get().splitlines())
