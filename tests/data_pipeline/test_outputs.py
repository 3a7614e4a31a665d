"""What the outputs keep when the disk is full."""

import pytest

from cosmo.engine.base.errors import UserError
from data_pipeline.calls.outputs import FILES, Outputs, Result


def result(number: int) -> Result:
    return Result({"soda": f'{{"n": {number}}}', "provenance": f'{{"o": {number}}}'})


class Full:
    """A file that takes nothing more."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise OSError(28, "No space left on device")

    def flush(self):
        self.write(b"")

    def close(self):
        self.file.close()
        self.write(b"")


@pytest.mark.parametrize("name", ["soda", "provenance"])
def test_no_half_triple_is_gone_on_from(tmp_path, name):
    """Oracle: after a full disk at triple 3, a second start writes each triple once."""
    outputs = Outputs(tmp_path, {}, 6)
    for number in range(3):
        outputs.add(number, result(number))
    outputs.save()
    outputs._files[name] = Full(outputs._files[name])
    with pytest.raises(UserError, match="No space left"):
        outputs.add(3, result(3))
    outputs.save()  # as the end of a run does
    outputs.close()
    outputs = Outputs(tmp_path, {}, 6)
    assert outputs.next == 3
    for number in range(3, 6):
        outputs.add(number, result(number))
    outputs.finish()
    whole = {n: (tmp_path / f"{n}.jsonl").read_text().split() for n in FILES}
    assert "".join(whole["soda"]) == "".join(f'{{"n":{n}}}' for n in range(6))
    assert "".join(whole["provenance"]) == "".join(f'{{"o":{n}}}' for n in range(6))


def test_a_full_disk_at_saving_is_said(tmp_path):
    """Oracle: one error that the command line can print."""
    outputs = Outputs(tmp_path, {}, 6)
    outputs.add(0, result(0))
    outputs._files["soda"] = Full(outputs._files["soda"])
    with pytest.raises(UserError, match="No space left"):
        outputs.save()
    outputs.close()
