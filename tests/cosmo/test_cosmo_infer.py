"""`infer` from the command line: shards, resuming, rejects, flags, and a loop of real kills."""

import gzip
import json
import random
import signal
import sys
import time

import pytest

from cosmo import records
from cosmo.__main__ import main
from cosmo.engine.infer import infer, record_sources
from cosmo.tasks import vocabularies
from tests import warm_process

# One shape to compile, for all commands of this file.
SMALL = (
    "--batch_size=4",
    "--max_new_tokens=4",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
)


def command(trained, *arguments) -> list[str]:
    return ["infer", f"--gin.MODEL_DIR={trained}", *SMALL, *map(str, arguments), "--quiet"]


def run(trained, *arguments) -> int:
    return main(command(trained, *arguments))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    """{name: bytes} of what a user sees in a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def write_input(path, count, bad=()):
    """`count` records without ids; a line in `bad` (from 0) is no JSON."""
    good = [
        json.dumps({"turns": [f"Question {i}?", "Yes.", f"And {i * i}?"]}) for i in range(count)
    ]
    path.write_text("".join(("oops" if i in bad else x) + "\n" for i, x in enumerate(good)))
    return path


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """(input, its answers by one uninterrupted command of 3 shards)."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_input(folder / "in.jsonl", 31, bad=(5, 20))
    assert run(trained, f"--input={source}", f"--output={folder / 'out'}", "--num_shards=3") == 0
    return source, contents(folder / "out")


def test_a_folder_of_shards(whole):
    """Oracle: the format in docs/infer.md. Ids are line numbers of the whole input."""
    _, files = whole
    names = [f"predictions-{i:05d}-of-00003.jsonl" for i in range(3)]
    assert set(files) == {*names, "rejected.jsonl"}
    answered = [json.loads(x)["id"] for n in names for x in files[n].splitlines()]
    assert answered == [str(i) for i in range(31) if i not in (5, 20)]
    rejected = [json.loads(x) for x in files["rejected.jsonl"].splitlines()]
    assert [(r["line"], r["record"]) for r in rejected] == [(6, "oops"), (21, "oops")]


def test_a_finished_run_opens_no_model(trained, whole, capsys, monkeypatch):
    """Property: the same command again says so, with exit code 0."""
    source, files = whole
    monkeypatch.setattr(infer.SessionConfig, "open", None)
    output = source.parent / "out"
    assert run(trained, f"--input={source}", f"--output={output}", "--num_shards=3") == 0
    assert "complete: 29 records answered, 2 rejected" in capsys.readouterr().out
    assert contents(output) == files


def test_shards_apart_and_compressed_input(trained, whole, tmp_path):
    """Property: commands with shards of their own, one of them reading far into a .gz, give the
    bytes of one command over the plain file."""
    source, files = whole
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    for chosen in ("1-2", "0"):
        assert run(
            trained, f"--input={packed}", f"--output={tmp_path / 'out'}", "--num_shards=3",
            f"--shards={chosen}",
        ) == 0  # fmt: skip
    assert contents(tmp_path / "out") == files


@pytest.mark.slow
def test_two_processes_at_once(trained, whole, tmp_path):
    """Property: two processes that share a folder, with one shard in common, leave the bytes of
    one command."""
    source, files = whole
    cut = [f"--input={source}", f"--output={tmp_path / 'out'}", "--window=4", "--num_shards=3"]
    both = [
        warm_process.Popen(
            [sys.executable, "-m", "cosmo", *command(trained, *cut, f"--shards={chosen}")]
        )
        for chosen in ("0-1", "1-2")
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert contents(tmp_path / "out") == files


def test_a_mixture_is_sharded_and_resumed_too(trained, tmp_path, capsys):
    """Property: shards of a SeqIO task together are its one file; a second command does nothing."""
    one, many = tmp_path / "one", tmp_path / "many"
    start = ["--gin.INFER_NUM_EXAMPLES=5", "--output"]
    assert run(trained, *start, one) == 0
    for chosen in ("1", "0"):
        assert run(trained, *start, many, "--num_shards=2", f"--shards={chosen}") == 0
    for task in ("soda", "prosocial_dialog"):
        names = [f"{task}-predict-{i:05d}-of-00002.jsonl" for i in range(2)]
        together = b"".join((many / name).read_bytes() for name in names)
        assert together == (one / f"{task}-predict.jsonl").read_bytes()
    capsys.readouterr()
    assert run(trained, *start, one) == 0
    assert capsys.readouterr().out.count("complete: 5 records") == 2


def test_flags_are_the_macros(trained, whole, tmp_path):
    """Oracle: the same settings given as gin macros; a flag wins over a file and over a macro."""
    source, _ = whole
    file = tmp_path / "mine.gin"
    file.write_text("TEMPERATURE = 0.5\nTOP_P = 0.5\nTOP_K = 3\nNUM_SAMPLES = 1\nRANDOM_SEED = 8\n")
    flags = ["--temperature=1.5", "--top_p=0.9", "--top_k=7", "--num_samples=2", "--seed=3"]
    flags += ["--min_length=3", "--block_ngram=2", "--context_block_ngram=4", "--banned_ids=3,9"]
    macros = [f"--gin.{m}" for m in ("TEMPERATURE=1.5", "TOP_P=0.9", "TOP_K=7", "NUM_SAMPLES=2")]
    macros += ["--gin.MIN_LENGTH=3", "--gin.BLOCK_NGRAM=2", "--gin.CONTEXT_BLOCK_NGRAM=4"]
    macros += ["--gin.BANNED_IDS=(3, 9)"]
    for name, given in {
        "flags": [f"--gin_file={file}", *flags, "--gin.RANDOM_SEED=9"],
        "macros": [*macros, "--gin.RANDOM_SEED=3"],
    }.items():
        given = [f"--gin_file={trained}/config.gin", *given, f"--input={source}"]
        assert run(trained, *given, f"--output={tmp_path / name}.jsonl") == 0
    assert (tmp_path / "flags.jsonl").read_bytes() == (tmp_path / "macros.jsonl").read_bytes()
    first = lines(tmp_path / "flags.jsonl")[0]
    assert len(first["predictions"]) == len(first["scores"]) == 2


def test_an_input_that_was_cut_says_so(trained, tmp_path, capsys):
    """Oracle: by hand: a dialogue of 40 turns does not fit 64 tokens, one of a word does. The
    count comes with the report, also of a run that was complete before."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = ({"turns": ["Hi."]}, {"turns": ["We met again."] * 40})
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    for _ in range(2):
        assert run(trained, f"--input={source}", f"--output={output}") == 0
        assert "0 rejected, 1 from an input that was cut to fit" in capsys.readouterr().out
    assert [line.get("cut") for line in lines(output)] == [None, True]


# Bad input.


def refusal(capsys, trained, *arguments) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    capsys.readouterr()
    assert run(trained, *arguments) == 1
    found = capsys.readouterr().err.strip().splitlines()
    assert found[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in found) == 1
    return found[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--input=/no/such.jsonl"],
            "/no/such.jsonl cannot be read: No such file or directory (--input)",
        ),
        (["--input={folder}"], "cannot be read: Is a directory"),
        (["--input={empty}"], "empty.jsonl is empty; give JSON lines of"),
        (["--input={cut}"], "cut.jsonl.gz cannot be read"),
        (
            ["--input={source}", "--shards=1"],
            "shards=1: there are shards 0 to 0 (--shards, --num_shards)",
        ),
        (["--input={source}", "--num_shards=0"], "at least 1 (--num_shards)"),
        (["--input={source}", "--window=0"], "window=0; it must be at least 1 record (--window)"),
        (["--input={source}", "--num_shards=2"], "num_shards=2 files do not fit"),
        (["--input={source}", "--num_samples=2"], "num_samples > 1 without temperature"),
        (["--input={source}", "--top_p=2", "--temperature=1"], "top_p=2.0; it must be"),
        (["--input={source}", "--mode=guess"], "mode='guess'"),
        (
            ["--input={source}", "--batch_size=0"],
            "batch_size=0; it must be at least 1 (--batch_size)",
        ),
        (["--input={source}", "--seed=1"], "seed=0, this command has 1"),
        (["--input={source}", "--overwrite", "--shards=0"], "without a choice of shards"),
        (["--input={source}", "--overwrite", "--gin.CHECKPOINT_PATH=/none"], "/none"),
        (
            ["--input={source}", "--overwrite", "--gin.MODEL/t5.T5Config.mlp_dim=48"],
            "another model size",
        ),
        (["--input={other}"], "was begun with input."),
    ],
)
def test_mistakes(trained, whole, tmp_path, capsys, arguments, expected):
    """One line that names what is wrong; what was there before stays as it was."""
    source, _ = whole
    places = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "other")}
    places |= {"source": source, "folder": tmp_path, "cut": tmp_path / "cut.jsonl.gz"}
    places["empty"].write_text("")
    places["cut"].write_bytes(gzip.compress(source.read_bytes())[:-20])
    write_input(places["other"], 31)
    output = source.parent / "one.jsonl"
    assert run(trained, f"--input={source}", f"--output={output}") == 0
    before = output.read_bytes()
    arguments = [argument.format(**places) for argument in arguments]
    assert expected in refusal(capsys, trained, f"--output={output}", *arguments)
    assert output.read_bytes() == before


def test_input_needs_an_output(trained, whole, capsys):
    """The flag is named."""
    assert "--output" in refusal(capsys, trained, f"--input={whole[0]}")


def test_every_line_is_answered_or_rejected(tmp_path):
    """Property: what cannot be used is set aside with line, reason and text, whatever is wrong with
    it; blank lines are no records; twice the same id, or null, is none of the model's business."""
    path = tmp_path / "in.jsonl"
    good = b'{"id": "same", "turns": ["Hi."]}'
    bad = [
        b"\xff\xfe",
        b'{"turns": ["\\ud800"]}',
        b"[" * 100_000,
        b"3",
        b'{"turns": [""]}',
    ]
    # Half a character in an id or an unknown field hinders nobody: the answer can be written.
    odd = [b'{"id": "\\ud800", "turns": ["Hi."]}', b'{"turns": ["Hi."], "what\\ud800": 1}']
    null = b'{"id": null, "turns": ["Hi."]}'
    path.write_bytes(b"\n".join([good, *bad, *odd, b"  ", good + b"\r", null]))
    vocabulary = vocabularies.load("tasks/sample/vocabulary.model")
    source = records.source(str(path), vocabulary, 32)
    (items,) = source.read([record_sources.Span(0, 0, source.count)])
    rejects = [item for item in items if isinstance(item, record_sources.Rejected)]
    assert [reject.line for reject in rejects] == list(range(2, 2 + len(bad)))
    json.dumps([tuple(reject) for reject in rejects], ensure_ascii=False).encode()
    rows = [item for item in items if not isinstance(item, record_sources.Rejected)]
    assert [row.id for row in rows] == ["same", "\ud800", "7", "same", "10"]


def test_any_span_can_be_read(tmp_path, monkeypatch):
    """Oracle: the lines themselves, however far apart their index is."""
    monkeypatch.setattr("cosmo.engine.infer.record_sources.INDEX_EVERY", 4)
    path = write_input(tmp_path / "in.jsonl", 30)
    vocabulary = vocabularies.load("tasks/sample/vocabulary.model")
    source = records.source(str(path), vocabulary, 32)
    for spans in ([(0, 3), (3, 9), (11, 12)], [(29, 30)], [(4, 8), (21, 27)]):
        found = list(source.read([record_sources.Span(0, *span) for span in spans]))
        assert [[int(row.id) for row in rows] for rows in found] == [list(range(*s)) for s in spans]


@pytest.mark.slow
def test_killed_again_and_again(trained, tmp_path):
    """Oracle: an uninterrupted run. SIGKILL at random moments until a command gets through."""
    source = write_input(tmp_path / "in.jsonl", 1200, bad=(7, 500, 1199))
    cut = [f"--input={source}", "--num_shards=3", "--window=20"]
    assert run(trained, *cut, f"--output={tmp_path / 'whole'}") == 0
    start = [sys.executable, "-m", "cosmo", *command(trained, *cut, f"--output={tmp_path / 'out'}")]
    moments, kills, code = random.Random(0), 0, None
    while code is None:
        process = warm_process.Popen(start)
        work = tmp_path / "out/.predictions.work"
        before = len(list(work.iterdir())) if work.exists() else 0
        # Wait until something is written, or start-up would be all that is killed.
        while process.poll() is None and (not work.exists() or len(list(work.iterdir())) == before):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        code = None if process.wait() == -signal.SIGKILL else process.returncode
    assert code == 0
    assert kills >= 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
