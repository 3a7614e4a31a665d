"""Train, plan, infer and evaluate by the command line, as a first user of the newest JAX would.

    python -m tests.newest

Exits with an error at the first command that fails. `make test-newest` runs it.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

# The import sets the environment of the commands: the tests' fast compiler and their one cache.
import tests.conftest  # noqa: F401
from tests.sizes import TINY


def main() -> None:
    """Run the commands one after another; print each."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"--gin.MODEL_DIR={folder}/run"
        recipe = "--gin_file=gin/cosmo/tiny.gin"
        answers = pathlib.Path(folder, "answers.jsonl")
        for arguments in (
            ["train", recipe, run, *TINY, "--gin.TRAIN_STEPS=4", "--gin.EVAL_PERIOD=2"],
            ["plan", recipe, *TINY, "--gin.TRAIN_STEPS=4", "--topology=cpu:4"],
            ["infer", run, "--input=tasks/sample/questions.jsonl", f"--output={answers}"],
            ["eval", run, "--gin.EVAL_NUM_EXAMPLES=4"],
        ):
            command = [sys.executable, "-m", "cosmo", *arguments]
            print("$", *command[1:], flush=True)
            subprocess.run(command, check=True)
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        assert lines and all("prediction" in line for line in lines)


if __name__ == "__main__":
    main()
