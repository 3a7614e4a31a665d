"""Print the table of plans in docs/accelerators.md as Markdown: `python -m tools.plan_table`.

Runs `python -m cosmo plan --json` for both Cosmo recipes on a slice of every kind of TPU, and for
Prost's on three slices. Each takes a minute or two on two cores. Needs the extra `tpu`, but no TPU.
"""

import argparse
import json
import subprocess
import sys

SLICES = (
    ("cosmo_3b", "v3:4x4"),
    ("cosmo_3b", "v4:2x2x4"),
    ("cosmo_3b", "v5e:4x8"),
    ("cosmo_3b", "v5p:2x2x2"),
    ("cosmo_3b", "v6e:4x4"),
    ("cosmo_11b", "v3:8x8"),
    ("cosmo_11b", "v4:4x4x4"),
    ("cosmo_11b", "v5e:8x16"),
    ("cosmo_11b", "v5p:2x4x4"),
    ("cosmo_11b", "v6e:8x8"),
    ("prost", "v3:2x2"),
    ("prost", "v3:4x4"),
    ("prost", "v4:2x2x2"),
)
HEADER = """\
| recipe | slice | devices | data x model | HBM, GiB | TFLOP, over the minimum | collectives, GB | \
step at least, s | days at half that speed | compiled in, s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def recipes(name: str) -> str:
    """Return the gin file of a recipe."""
    return f"gin/{name.partition('_')[0]}/{name}.gin"


def plan(recipe: str, topology: str, settings: list[str]) -> dict | None:
    """Return the plan as JSON; None if there is none, with the reason on stderr."""
    command = [sys.executable, "-m", "cosmo", "plan", "--quiet", "--json"]
    command += [f"--gin_file={recipes(recipe)}", f"--topology={topology}"]
    own = ["--gin.VOCABULARY_PATH=none"] if recipe == "prost" else []
    done = subprocess.run(
        [*command, *own, *settings],
        stdout=subprocess.PIPE,
        text=True,
    )
    # Not by the exit code: a plan that does not fit is a plan, with code 1.
    return json.loads(done.stdout) if done.stdout else None


def row(recipe: str, made: dict) -> str:
    """Return a row of the table."""
    gib = [made[f"hbm_{kind}_bytes"] for kind in ("peak", "limit")]
    cells = [
        recipe,
        made["topology"],
        made["devices"],
        f"{made['mesh']['data']} x {made['mesh']['model']}",
        " of ".join("?" if size is None else f"{size / 2**30:.1f}" for size in gib)
        + ("" if made["fits"] else ", **does not fit**"),
    ]
    if made["matmul_flops"]:
        ratio = made["matmul_flops"] / made["matmul_flops_minimum"]
        cells += [
            f"{made['matmul_flops'] / 1e12:.1f}, {ratio:.3f}",
            f"{sum(made['collective_bytes'].values()) / 1e9:.1f}",
            f"{made['step_seconds_bound']:.3f}",
            f"{made['days_at_half']:.1f}",
            f"{made['compile_seconds']:.0f}",
        ]
    else:
        # By arithmetic alone, or too large to compile: nothing was counted.
        cells += [""] * 5
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="rows with TEXT in their names")
    # Settings of gin are passed on as they are.
    args, settings = parser.parse_known_args(argv)
    if any(not setting.startswith("--gin.") for setting in settings):
        parser.error(f"unknown: {settings} (settings of all plans are given as --gin.NAME=VALUE)")
    # Flushed, as each row is: a row takes minutes.
    print(HEADER, flush=True)
    for recipe, topology in SLICES:
        if args.only in f"{recipe} {topology}":
            made = plan(recipe, topology, settings)
            print(row(recipe, made) if made else f"| {recipe} | {topology} | failed |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
