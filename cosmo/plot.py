"""Draw the loss curves of a run as a PNG: `python -m cosmo.plot MODEL_DIR --output=loss.png`."""

import argparse
import io
import json
import pathlib
import sys

from cosmo.engine.base.atomic import write_atomic
from cosmo.engine.base.command_line import guarded
from cosmo.engine.base.errors import UserError


def read_metrics(path: pathlib.Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl; UserError that names file and line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a run's metrics.jsonl") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from error
    return rows


def plot(rows: list[dict], output: pathlib.Path, title: str, baseline: float | None = None) -> None:
    """Draw training and validation loss (nats a token) over steps, `baseline` as a level."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display, as on servers
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    # A loss that is not finite is null in the file.
    train = [(r["step"], r["train/loss"]) for r in rows if r.get("train/loss") is not None]
    axes.plot(*zip(*train, strict=True), label="training", color="black")
    names = sorted({k for r in rows for k in r if k.startswith("eval/") and k.endswith("/loss")})
    for name in names:
        points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        # The mean over all tasks stands out among the single tasks.
        style = {"linewidth": 2} if name == "eval/all/loss" else {"linewidth": 1, "alpha": 0.6}
        label = f"validation, {name.split('/')[1]}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle=":", label="unigram model, validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.set_ylim(bottom=0)  # an axis that is cut would exaggerate the drop
    axes.grid(alpha=0.3)
    axes.legend()
    # In memory first, so that a failed drawing leaves an earlier file as it was.
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    # pyplot keeps every figure until it is closed.
    plt.close(figure)
    write_atomic(output, png.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Draw the curves; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cosmo.plot", description=__doc__)
    parser.add_argument("model_dir", type=pathlib.Path, help="a run's folder, with metrics.jsonl")
    parser.add_argument("--output", type=pathlib.Path, help="PNG; default MODEL_DIR/loss.png")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args.model_dir, args.output or args.model_dir / "loss.png"))


def run(model_dir: pathlib.Path, output: pathlib.Path) -> None:
    """Draw the curves of a run, and print where they are."""
    rows = read_metrics(model_dir / "metrics.jsonl")
    if not any(r.get("train/loss") is not None for r in rows):
        raise UserError(f"{model_dir}/metrics.jsonl holds no train/loss yet")
    plot(rows, output, title=str(model_dir))
    print(output)


if __name__ == "__main__":
    sys.exit(main())
