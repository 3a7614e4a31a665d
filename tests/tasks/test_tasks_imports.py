"""Oracle: the modules a fresh interpreter has loaded."""

import subprocess
import sys
from pathlib import Path


def test_light_modules_load_neither_tensorflow_nor_seqio():
    """Chatting, exporting and training from a cache must start without TensorFlow."""
    names = "formatting prosocial readers files families vocabularies metrics"
    modules = ", ".join(f"cosmo.tasks.{name}" for name in [*names.split(), "mixtures"])
    code = (
        f"import sys, {modules}\n"
        "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'jax', 'pyarrow', 'gin'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
