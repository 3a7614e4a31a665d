"""SeqIO's own cache of our tasks, written by Apache Beam. Needs the extra `pipeline`."""

import os
import subprocess
import sys

import pytest

from tests import lazily
from tests.tasks.tasks_samples import prosocial_row, soda_row, write_lines

pytest.importorskip("apache_beam", reason="needs the extra `pipeline`")
seqio = lazily.importorskip("seqio")

MODULE = """
import seqio
from cosmo.tasks import mixtures

seqio.add_global_cache_dirs([{cache!r}])
mixtures.use("cosmo", soda_path={soda!r}, prosocial_path={prosocial!r}, vocabulary_path={words!r})
"""


def test_beam_caches_the_tasks_and_training_reads_them(tmp_path, vocabulary_path, monkeypatch):
    """SeqIO's command with the DirectRunner, then two training steps from its cache.

    Oracle: the tasks read live, example by example; Beam's order is another.
    """
    from cosmo.__main__ import main

    (tmp_path / "soda").mkdir()
    (tmp_path / "prosocial").mkdir()
    for split in ("train", "validation"):
        write_lines(tmp_path / f"soda/{split}.jsonl", [soda_row(i, turns=5) for i in range(20)])
        rows = [prosocial_row(d, r, done=r == 1) for d in range(10) for r in range(2)]
        write_lines(tmp_path / f"prosocial/{split}.jsonl", rows)
    names = {"cache": "cache", "soda": "soda", "prosocial": "prosocial"}
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    module = MODULE.format(**paths, words=str(vocabulary_path))
    (tmp_path / "beam_tasks.py").write_text(module)
    environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"}
    command = [sys.executable, "-m", "seqio.scripts.cache_tasks_main", "--min_shards=2"]
    command += ["--tasks=soda,prosocial_dialog", f"--output_cache_dir={paths['cache']}"]
    done = subprocess.run(
        [*command, "--module_import=beam_tasks"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]

    before = seqio.get_global_cache_dirs()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        import beam_tasks  # noqa: F401

        for name, size in (("soda", 80), ("prosocial_dialog", 20)):
            task = seqio.get_mixture_or_task(name)
            read = [
                {
                    x["id"]: (x["inputs"].tolist(), x["targets"].tolist())
                    for x in task.get_dataset(
                        {"inputs": 60, "targets": 16}, "validation", use_cached=use, shuffle=False
                    ).as_numpy_iterator()
                }
                for use in (False, True)
            ]
            assert read[0] == read[1] and len(read[0]) == size
        command = ["train", "--gin_file=gin/cosmo/tiny.gin", f"--gin.MODEL_DIR={tmp_path}/run"]
        command += ["--gin.MIXTURE_OR_TASK_MODULE=beam_tasks", "--gin.USE_CACHED_TASKS=True"]
        command += [f"--gin.VOCABULARY_PATH={vocabulary_path}", "--gin.EVAL_PERIOD=None"]
        command += ["--gin.SODA_PATH=/nowhere", "--gin.PROSOCIAL_PATH=/nowhere"]
        assert main([*command, "--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=2"]) == 0
    finally:
        seqio.set_global_cache_dirs(before)
