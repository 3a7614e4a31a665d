"""Make a recording of a terminal from logs, and draw it as a picture that plays in a page.

    make quickstart 2>&1 | tee quickstart.txt
    python -m tools.terminal docs/figures/terminal.json "make quickstart" quickstart.txt

keeps the lines that match a pattern of the recording's `keep`. A line's time is the clock that it
begins with. `make figures` draws the recording, in light and dark.
"""

import argparse
import html
import json
import pathlib
import re

from cosmo.engine.base.atomic import write_atomic

MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.15, 0.9  # the whole plays in seconds
CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d) ")
LINE_PIXELS, CHAR_PIXELS, MARGIN = 18, 7.8, 16
MAX_CHARS = 100  # a longer line is cut
COLOURS = {
    "light": {"ground": "#f6f8fa", "ink": "#1b1f24", "prompt": "#0072b2", "edge": "#d0d7de"},
    "dark": {"ground": "#0d1117", "ink": "#e6e9ed", "prompt": "#56b4e9", "edge": "#30363d"},
}


def read_log(text: str, keep: str) -> list[list]:
    """Return [[seconds since the line before, line]] of the lines that match `keep`."""
    lines: list[list] = []
    before = None
    for line in text.splitlines():
        if not re.search(keep, line):
            continue
        clock, pause = CLOCK.match(line), 0
        if clock:
            hours, minutes, seconds = map(int, clock.groups())
            now = 3600 * hours + 60 * minutes + seconds
            pause = now - before if before is not None else 0
            before = now
        lines.append([pause, line[:MAX_CHARS]])
    return lines


def shown(recording: dict) -> list[tuple[float, str, bool]]:
    """Return (second of the drawing, text, whether a command) of each line."""
    second, rows = 0.0, []
    for part in recording["commands"]:
        second += MAX_PAUSE_SECONDS
        rows.append((second, part["command"], True))
        for pause, text in part["lines"]:
            second += min(max(pause, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS)
            rows.append((second, text, False))
    return rows


def draw(recording: dict, theme: str) -> str:
    """Return the SVG of a recording. Its lines appear one by one where motion is welcome."""
    colours, rows = COLOURS[theme], shown(recording)
    width = max(len(text) + 2 for _, text, _ in rows) * CHAR_PIXELS + 2 * MARGIN
    height = len(rows) * LINE_PIXELS + 2 * MARGIN
    texts = []
    for number, (second, text, is_command) in enumerate(rows):
        y = MARGIN + LINE_PIXELS * (number + 0.75)
        prompt = '<tspan class="prompt">$ </tspan>' if is_command else ""
        style = f'style="animation-delay:{second:.1f}s"'
        words = html.escape(text, quote=False)
        texts.append(f'<text class="line" x="{MARGIN}" y="{y:g}" {style}>{prompt}{words}</text>')
    title = html.escape(recording["about"], quote=False)
    body = "\n".join(texts)
    # Without motion, and where animation is unknown, all lines stand there from the start.
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" \
height="{height:g}" role="img">
<title>{title}</title>
<style>
text {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; \
fill: {colours["ink"]} }}
.prompt {{ fill: {colours["prompt"]}; font-weight: bold }}
@media (prefers-reduced-motion: no-preference) {{
  .line {{ opacity: 0; animation: appear 0.1s forwards }}
}}
@keyframes appear {{ to {{ opacity: 1 }} }}
</style>
<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8" \
fill="{colours["ground"]}" stroke="{colours["edge"]}"/>
{body}
</svg>
"""


def main() -> None:
    """Make a recording anew from the logs of its commands."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.terminal", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("recording", type=pathlib.Path, help="JSON file with `about` and `keep`")
    parser.add_argument("logs", nargs="+", metavar="COMMAND LOG", help="pairs of both")
    args = parser.parse_args()
    recording = json.loads(args.recording.read_text())
    recording["commands"] = [
        {"command": command, "lines": read_log(pathlib.Path(log).read_text(), recording["keep"])}
        for command, log in zip(args.logs[::2], args.logs[1::2], strict=True)
    ]
    write_atomic(args.recording, json.dumps(recording, indent=1) + "\n")


if __name__ == "__main__":
    main()
