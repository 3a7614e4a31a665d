"""The measurement of accelerators: which cases run, and what is kept."""

import json

import pytest

from tools import bench, bench_device_cases


def test_a_second_start_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    """Oracle: the cases that ran, the exit codes, and the file of results."""
    ran = []

    def measure(case, rehearse, seconds):
        ran.append(case)
        failed = case.kind == "label" and ran.count(case) == 1
        return {"error": "no memory"} if failed else {"tokens_per_second": 2.0, "peak_bytes": 2**30}

    monkeypatch.setattr(bench_device_cases, "measure_case", measure)
    command = ["device", f"--output={tmp_path}/device.json", "--rehearse"]
    assert bench.main(command) == 1
    assert "failed: no memory" in capsys.readouterr().out
    assert ran == list(bench_device_cases.CASES)
    assert bench.main(command) == 0
    assert [case.kind for case in ran[len(bench_device_cases.CASES) :]] == ["label"]
    kept = json.loads((tmp_path / "device.json").read_text())
    assert list(kept) == [case.name for case in bench_device_cases.CASES]


def test_no_case_begins_after_the_given_time(tmp_path, capsys):
    """Oracle: no process and no file; every case is named as missing."""
    assert bench.main(["device", f"--output={tmp_path}/device.json", "--minutes=0"]) == 1
    assert not (tmp_path / "device.json").exists()
    missing = capsys.readouterr().err
    assert all(case.name in missing for case in bench_device_cases.CASES)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["decode", "label"])
def test_inference_of_a_tiny_network(kind, capsys):
    """Oracle: one line of JSON with a positive rate."""
    sizes = ["--batch_size=2", "--inputs=16", "--targets=4", "--steps=1"]
    assert bench.main(["device", f"--kind={kind}", "--model=t5_1_1_tiny", *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["labels_per_second" if kind == "label" else "tokens_per_second"] > 0
