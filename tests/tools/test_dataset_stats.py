"""Oracles: small files counted by hand, recorded reference numbers, published labels."""

import gzip
import json
import pathlib
import re

import numpy as np
import pytest

from cosmo.engine.base.progress import Progress
from cosmo.tasks.metrics import agreement
from tools import corpus_files, corpus_stats, dataset_stats, plot_labels

SMALL = pathlib.Path(__file__).resolve().parents[1] / "golden/statistics_small.json"
CAUTION = ["needs caution"] * 3
LABEL = {
    ("casual",) * 3: "__casual__",
    tuple(CAUTION): "__needs_caution__",
    ("needs caution", "casual", "casual"): "__possibly_needs_caution__",
}


def count(path):
    return dataset_stats.statistics(dataset_stats.find(path))


def row(dialogue, response, done, votes=("casual",) * 3, rots=None, **changes):
    """A ProsocialDialog row; the context has 4 words, the response 3."""
    made = {
        "context": "I did that thing",
        "response": "Why did you",
        "rots": rots,
        "safety_label": LABEL[tuple(votes)],
        "safety_annotations": list(votes),
        "safety_annotation_reasons": ["", "", ""],
        "source": "sbic",
        "dialogue_id": dialogue,
        "response_id": response,
        "episode_done": done,
    }
    return {key: value for key, value in (made | changes).items() if value != "absent"}


def write(path, lines):
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return str(path)


def prosocial(tmp_path, *more):
    """Two whole dialogues of two exchanges each, then `more` lines."""
    rows = [
        row(0, 0, False, CAUTION, ["It's wrong.", "Be kind to people."]),
        row(0, 1, True, ("needs caution", "casual", "casual"), ["It's wrong."]),
        row(1, 0, False, CAUTION, ["It's wrong."], source="ethics_amt"),
        row(1, 1, True, rots=[]),
    ]
    return write(tmp_path / "rows.jsonl", [*rows, *more])


def test_prosocial_by_hand(tmp_path):
    """Oracle: counted by hand: 2 dialogues, 8 utterances of 4 or 3 words, 4 RoTs, 2 of them
    different, of 2, 4, 2, 2 words; labels and their successors.
    """
    made = count(prosocial(tmp_path))
    assert (made["corpus"], made["dialogues"], made["utterances"]) == ("ProsocialDialog", 2, 8)
    assert (made["average_turns"], made["average_utterance_words"]) == (4.0, 3.5)
    # "It's wrong." has the 3-gram (it, s, wrong), three times; the other RoT has two.
    trigrams = {"per_dialogue": 2.0, "unique_3grams": 3 / 5}
    assert made["rots"] == {"total": 4, "unique": 2, "average_words": 2.5, **trigrams}
    safety = made["safety"]
    assert safety["overall"] == [1, 1, 0, 2, 0]
    assert safety["by_turn"] == [
        {"turn": 1, "counts": [0, 0, 0, 2, 0]},
        {"turn": 2, "counts": [1, 1, 0, 0, 0]},
    ]
    assert safety["transitions"][0]["turn"] == 1
    assert corpus_stats.all_transitions(safety)[3].tolist() == [1, 1, 0, 0, 0]
    assert corpus_stats.all_transitions(safety).sum() == 2
    assert safety["sources"] == {"sbic": 1, "ethics_amt": 1}
    assert (safety["votes"]["rows"], safety["votes"]["label_differs"]) == (4, 0)
    assert (made["bad_records"], made["incomplete_dialogues"]) == (0, {})
    json.dumps(made, allow_nan=False)


def test_alpha_equals_the_reference():
    """Oracle: krippendorff 0.9.0's recorded numbers of a 3 x 60 table with missing ratings."""
    pytest.importorskip("krippendorff")
    golden = json.loads(SMALL.read_text())["krippendorff"]
    ratings = np.array(golden["ratings"], float)
    counts = np.stack([(ratings == value).sum(0) for value in range(3)], axis=1)
    for level in ("nominal", "ordinal"):
        assert agreement.alpha(counts, level) == pytest.approx(golden[level], rel=1e-9)


def test_alpha_by_hand():
    """Oracle: Krippendorff 2011: units aaa and aab: 6 values, 1 - 5 * (2 observed disagreements'
    coincidences: 1 ab + 1 ba of 6) / (5 a * 1 b * 2) = 1 - 5 * 2 / 10 = 0; all alike: undefined.
    """
    pytest.importorskip("krippendorff")
    assert agreement.alpha([[3, 0, 0], [2, 1, 0]], "nominal") == pytest.approx(0.0)
    assert agreement.alpha([[3, 0], [0, 3]], "nominal") == pytest.approx(1.0)
    assert agreement.alpha([[3, 0, 0], [3, 0, 0]], "nominal") is None
    assert agreement.alpha(np.zeros((0, 3), int), "ordinal") is None


def test_incomplete_dialogues_count_for_labels_only(tmp_path):
    """Oracle: dialogues 2, 3 and 4 lack beginning, middle and end; their 4 rows count."""
    more = [row(2, 1, True), row(3, 0, False), row(3, 2, True), row(4, 0, False)]
    made = count(prosocial(tmp_path, *more))
    assert made["incomplete_dialogues"] == {"beginning": 1, "middle": 1, "end": 1}
    assert (made["dialogues"], made["utterances"], made["safety"]["rows"]) == (2, 8, 8)
    assert [x["turn"] for x in made["safety"]["by_turn"]] == [1, 2, 3]
    # Of the rows of dialogue 3 the second does not follow the first.
    assert corpus_stats.all_transitions(made["safety"]).sum() == 2
    assert "2 lack" not in dataset_stats.text([made])
    assert "3 incomplete dialogues: 1 lack the beginning, 1 lack the middle" in (
        dataset_stats.text([made])
    )


def test_two_samples_joined_have_the_same_numbers(tmp_path):
    """Oracle: a dialogue 4 that breaks off before another one's 4: one lacks its end, one is whole.

    Rows that do not say `episode_done` end where the next dialogue begins.
    """
    made = count(prosocial(tmp_path, row(4, 0, False), row(4, 0, True)))
    assert (made["dialogues"], made["incomplete_dialogues"]) == (3, {"end": 1})
    silent = [row(d, r, "absent") for d, r in ((8, 0), (8, 1), (8, 0), (9, 0))]
    made = count(write(tmp_path / "silent.jsonl", silent))
    assert (made["dialogues"], made["utterances"], made["incomplete_dialogues"]) == (3, 8, {})


BAD = (
    ('{"context": \n', "broken JSON"),
    (row(5, 0, True, context="absent"), "field 'context' is missing"),
    (row(5, 0, True, safety_label="__fine__"), "unknown value: got '__fine__'"),
    (row(5, 0, True, context=" "), "field 'context' is empty"),
    (row(5, 0, True, safety_annotations=["casual"] * 2), "2 votes"),
    (row(5, 0, True, safety_annotations=["casual", "fine", "casual"]), "unknown vote 'fine'"),
    ('"a string"\n', "not a record"),
)


@pytest.mark.parametrize("bad, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_record_is_said_and_the_rest_counted(tmp_path, capsys, bad, reason):
    """Oracle: file, line 5 and reason; the two good dialogues before it and one after it count."""
    path = prosocial(tmp_path, bad, row(6, 0, True))
    assert dataset_stats.main([path]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"rows.jsonl:5: .*{reason}", said)
    assert "1 bad record:" in said
    made = count(path)
    # Bad votes spoil the votes, not the dialogue.
    assert made["dialogues"] == (4 if "vote" in reason else 3)
    assert made["safety"]["votes"]["rows"] == 5
    assert dataset_stats.main([path, "--strict"]) == 1
    capsys.readouterr()


def test_a_label_that_its_votes_do_not_give(tmp_path):
    """Oracle: appendix A.4: three votes for casual are no possible caution."""
    made = count(prosocial(tmp_path, row(7, 0, True, safety_label="__possibly_needs_caution__")))
    votes = made["safety"]["votes"]
    assert votes["label_differs"] == 1
    place = f"{tmp_path}/rows.jsonl:5"
    assert votes["differing"] == [f"{place}: __possibly_needs_caution__, votes: __casual__"]
    assert made["safety"]["rows_that_lack_rots"] == 1


def test_hub_rows_and_direct_download_agree(tmp_path):
    """Oracle: the same dialogues in the publisher's other format."""
    hub = prosocial(tmp_path)
    rows = [json.loads(line) for line in pathlib.Path(hub).read_text().splitlines()]
    nested = [
        [
            r | {"text": r["context"], "labels": [r["response"]]}
            for r in rows
            if r["dialogue_id"] == i
        ]
        for i in (0, 1)
    ]
    for r in (r for dialogue in nested for r in dialogue):
        for key in ("context", "response", "dialogue_id", "response_id"):
            del r[key]
    path = write(tmp_path / "direct.json", [json.dumps(nested, indent=1)])
    one, two = count(hub), count(path)
    assert {k: v for k, v in one.items() if k != "path"} == {
        k: v for k, v in two.items() if k != "path"
    }


SAY = ["one two three", "four five"]  # 2 utterances, 5 words
OTHERS = {
    "SODA": {"narrative": "N.", "dialogue": SAY, "speakers": ["A", "B"]},
    "BlendedSkillTalk": [
        {
            "personas": [],
            "free_turker_utterance": SAY[0],
            "guided_turker_utterance": SAY[1],
            "dialog": [],
        }
    ],
    "Wizard of Wikipedia": [
        {"chosen_topic": "x", "dialog": [{"speaker": "0_Wizard", "text": t} for t in SAY]}
    ],
    "Topical-Chat": {"t_1": {"content": [{"message": t, "agent": "agent_1"} for t in SAY]}},
    'records {"turns": [...]}': {"turns": SAY},
    "DailyDialog": "one two three __eou__ four five __eou__\n",
    "EmpatheticDialogues": "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,"
    "tags\n"
    "hit:0_conv:1,1,sad,p_comma_ q,1,one two_comma_ three,5|5|5,\n"
    "hit:0_conv:1,2,sad,p_comma_ q,0,four five,5|5|5,\n",
    "Holl-E": [{"chat_id": 1, "query": SAY[0], "response": SAY[1]}],
    "MIC": "Q,A,rot\none two three,four five,r\n",
    "PersonaChat": "1 your persona: i ski.\n2 one two three\tfour five\t\ta|b|four five\n",
}


@pytest.mark.parametrize("corpus", OTHERS)
def test_other_corpora_by_hand(tmp_path, corpus):
    """Oracle: one dialogue of two utterances and five words in its publisher's format."""
    name = {"DailyDialog": "d.txt", "PersonaChat": "p.txt", "EmpatheticDialogues": "e.csv",
            "MIC": "m.csv"}  # fmt: skip
    made = count(write(tmp_path / name.get(corpus, "x.json"), [OTHERS[corpus]]))
    assert made["corpus"] == corpus
    assert (made["dialogues"], made["utterances"]) == (1, 2)
    assert made["average_utterance_words"] == 2.5
    assert (made["mtld"], made["rots"], made["safety"]) == (None, None, None)
    assert made["bad_records"] == 0
    assert corpus in dataset_stats.table([made]) or corpus not in dataset_stats.STATISTICS


def test_parquet_and_gzip(tmp_path):
    """Oracle: SODA as the hub ships it, and compressed lines; both have OTHERS' one dialogue."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([OTHERS["SODA"]]), tmp_path / "train.parquet")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(OTHERS["SODA"]).encode()))
    for name in ("train.parquet", "x.jsonl.gz"):
        made = count(str(tmp_path / name))
        assert (made["corpus"], made["dialogues"], made["utterances"]) == ("SODA", 1, 2)
    both = count(str(tmp_path / "*"))
    assert (both["files"], both["dialogues"]) == (2, 2)


def test_a_damaged_file_is_counted_up_to_the_damage(tmp_path):
    """Oracle: a gzip file without its end, a list that breaks off: said; what was read counts."""
    whole = gzip.compress((json.dumps(OTHERS["SODA"]) + "\n").encode() * 3000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.json").write_text(json.dumps(OTHERS["BlendedSkillTalk"] * 2)[:-5])
    for name, least in (("cut.jsonl.gz", 2), ("cut.json", 1)):
        made = count(str(tmp_path / name))
        assert made["dialogues"] >= least and made["bad_records"] == 1
        assert "The rest of the file is not counted." in made["bad_records_quoted"][0]


def test_every_recognised_corpus_was_tried():
    """Oracle: the table of readers."""
    assert set(OTHERS) | {"ProsocialDialog", "ProsocialDialog (direct download)"} == set(
        corpus_files.READERS
    )


@pytest.mark.parametrize(
    "corpus, bad, reason",
    [
        ("BlendedSkillTalk", [{"free_turker_utterance": "a"}], "'guided_turker_utterance' is"),
        ("DailyDialog", "one __eou__ broken off\n", "not a line of DailyDialog"),
        ("EmpatheticDialogues", "hit:0_conv:2,one,x\n", "wrong number of fields"),
        ("PersonaChat", "no number\n", "not a numbered line"),
        ("SODA", {"narrative": "N.", "dialogue": ["a", ""], "speakers": ["A", "B"]}, "is empty"),
        ("SODA", {"narrative": "N.", "dialogue": "ab", "speakers": ["A", "B"]}, "'dialogue'"),
        ("SODA", {"narrative": "N.", "dialogue": ["a", "b"], "speakers": "AB"}, "'speakers'"),
        ('records {"turns": [...]}', {"turns": "hello"}, "utterances are no list: got 'hello'"),
        ('records {"turns": [...]}', {"turns": {"a": 1}}, "utterances are no list"),
        ("PersonaChat", "1 hi\t\n2 you\thi\n", "an exchange lacks an utterance: got 'hi"),
        ("Wizard of Wikipedia", [{"chosen_topic": "x", "dialog": "hello"}], "'dialog' has a wrong"),
    ],
)  # fmt: skip
def test_bad_records_of_other_corpora(tmp_path, corpus, bad, reason):
    """Oracle: the record is given back as an error, and the one before it counts."""
    good = OTHERS[corpus]
    lines = [good, bad] if not isinstance(good, list) else [good + bad]
    path = write(tmp_path / ("x.txt" if isinstance(good, str) else "x.json"), lines)
    made = count(path)
    assert (made["dialogues"], made["bad_records"]) == (1, 1)
    assert reason in made["bad_records_quoted"][0]


def test_many_paths_one_table_and_files(tmp_path, capsys):
    """Oracle: a row each and the papers' below; a folder of files is one corpus; the PNG is one."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "daily"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        write(folder / name, [OTHERS["DailyDialog"]])
    args = [
        prosocial(tmp_path),
        str(folder),
        f"--output={tmp_path}/out",
        f"--plot={tmp_path}/p.png",
    ]
    assert dataset_stats.main(args) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:3] == ["rows.jsonl", "2", "8"]
    assert said[2].split()[-3:] == ["217,321", "160,296", "9.5"]
    assert said[3].split()[:3] == ["daily", "2", "4"]
    assert said[4].split()[2:7] == ["13k", "104k", "7.9", "14.6", "63.0"]
    assert (tmp_path / "out/statistics.txt").read_text().splitlines() == said
    assert json.loads((tmp_path / "out/statistics.json").read_text())[1]["files"] == 2
    for path in (tmp_path / "p.png", tmp_path / "out/labels.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert dataset_stats.main([*args[:1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["dialogues"] == 2


def test_the_figure_says_what_the_table_says(tmp_path, monkeypatch):
    """Oracle: shares of `prosocial`'s labels by hand: 1, 1, 2 of 4; 2 of 2; 1, 1 of 2; from
    caution one each to casual and possible caution; a band each, as wide as half of a bar.
    """
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    safety = count(prosocial(tmp_path))["safety"]
    plot_labels.plot(safety, tmp_path / "p.png", "title")
    overall, flow, heat = figures[0].axes
    assert [t.get_text() for t in overall.texts] == ["25%", "25%", "50%"]
    assert [t.get_text() for t in flow.texts] == ["100%", "50%", "50%"]
    ticks = [t.get_text() for t in flow.get_xticklabels()]
    assert ticks == ["turn 1\n2 contexts", "turn 2\n2 contexts"]
    bands = [band.get_paths()[0].get_extents() for band in flow.collections]
    assert [(b.y0, b.y1) for b in bands] == [(0.0, 0.5), (0.5, 1.0)]
    assert [t.get_text() for t in heat.texts][15:20] == ["50%\n1", "50%\n1", *["0%\n0"] * 3]


@pytest.mark.parametrize(
    "lines, words",
    [
        (None, "no data: got nothing there"),
        ([{"head": "a", "relation": "b", "tail": "c"}], "not a corpus of dialogues: got .* ATOMIC"),
        (["hello\n"], "got x.jsonl: nothing known"),
        (["\n"], "got x.jsonl: is empty"),
        ([row(0, 0, True, source=3), row(1, 0, True, context="")], "no dialogue"),
    ],
)  # fmt: skip
def test_nothing_to_count_is_an_error(tmp_path, capsys, lines, words):
    """Oracle: what, where; exit code 1."""
    path = tmp_path / "x.jsonl"
    if lines:
        write(path, lines)
    assert dataset_stats.main([str(path)]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_two_corpora_in_a_folder_are_refused(tmp_path, capsys):
    """Oracle: both are named. A plot of what has no labels is refused too."""
    prosocial(tmp_path)
    daily = write(tmp_path / "daily.txt", [OTHERS["DailyDialog"]])
    assert dataset_stats.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "several corpora" in said and "daily.txt: DailyDialog" in said
    assert dataset_stats.main([daily, f"--plot={tmp_path}/p.png"]) == 1
    assert "draws one ProsocialDialog: got 0" in capsys.readouterr().err


def test_a_missing_extra_is_said_before_reading(tmp_path, monkeypatch, capsys):
    """Oracle: the extra's name, and nothing read."""
    monkeypatch.setattr(dataset_stats.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dataset_stats, "statistics", None)
    assert dataset_stats.main([prosocial(tmp_path)]) == 1
    assert "krippendorff is not installed: pip install -e '.[stats]'" in capsys.readouterr().err


def test_progress_has_rate_and_time_left(tmp_path, monkeypatch, caplog):
    """Oracle: 600 lines of the same length: after 512 their bytes suggest a total of 600."""
    path = write(tmp_path / "d.txt", [OTHERS["DailyDialog"]] * 600)

    def often(total, unit):
        return Progress(total, unit=unit, every_seconds=0)

    monkeypatch.setattr(dataset_stats, "Progress", often)
    with caplog.at_level("INFO", logger="cosmo"):
        count(path)
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and re.search(r"dialogue 512/600 d.txt .* dialogues/s, .* left", said[1])


def test_real_rows(shared):
    """Oracle: the published label of each of 13 real rows follows from its votes; the sizes of the
    real validation split of DailyDialog (1,000 dialogues, 8,069 utterances).
    """
    made = count(str(shared / "data/prosocial_rows.jsonl"))
    assert made["safety"]["votes"]["rows"] == 13
    assert (made["safety"]["votes"]["label_differs"], made["bad_records"]) == (0, 0)
    daily = count(str(shared / "data/dailydialog_validation.txt"))
    assert (daily["dialogues"], daily["utterances"], daily["bad_records"]) == (1000, 8069, 0)
    assert count(str(shared / "data/soda_rows.jsonl"))["dialogues"] == 5


def test_a_folder_of_the_data_pipeline_is_counted_once(tmp_path, capsys):
    """Oracle: soda.jsonl has the one dialogue; what stands beside it is left out and named. A file
    that is asked for by its name is read.
    """
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("soda.jsonl", "rejected.jsonl", "provenance.jsonl"):
        write(tmp_path / name, [OTHERS["SODA"]])
    (tmp_path / "soda.jsonl.gz").write_bytes(gzip.compress(json.dumps(OTHERS["SODA"]).encode()))
    pq.write_table(pa.Table.from_pylist([OTHERS["SODA"]]), tmp_path / "soda.parquet")
    write(tmp_path / "report.json", [{"calls": {}}])
    for path in (tmp_path, tmp_path / "*"):
        made = count(str(path))
        assert (made["files"], made["dialogues"], made["not_read"]) == (1, 1, [])
        assert dataset_stats.main([str(path)]) == 0
        said = capsys.readouterr().out
        for name in ("soda.parquet", "soda.jsonl.gz"):
            assert f"left out {tmp_path}/{name}: the same data as soda.jsonl" in said
        for name in ("rejected.jsonl", "provenance.jsonl", "report.json"):
            assert f"left out {tmp_path}/{name}: no dialogues of the corpus" in said
    for name in ("rejected.jsonl", "soda.parquet"):
        made = count(str(tmp_path / name))
        assert (made["dialogues"], made["left_out"]) == (1, [])


def test_holle_and_mic(tmp_path):
    """Oracle: by hand: exchanges of a chat share utterances; rules of thumb share an answer."""
    pairs = [("a", "Hi you", "Oh hi"), ("a", "Oh hi", "Seen it"), ("b", "Well", "No")]
    holle = [{"chat_id": c, "query": q, "response": r, "full": "x"} for c, q, r in pairs]
    path = tmp_path / "train_data.json"
    path.write_text(json.dumps(holle))
    made = count(str(path))
    assert (made["corpus"], made["dialogues"], made["utterances"]) == ("Holl-E", 2, 5)
    assert "papers: Holl-E" in dataset_stats.table([made])
    mic = tmp_path / "MIC.csv"
    mic.write_text('Q,A,rot,split\nWhy?,"So, so",r1,train\nWhy?,"So, so",r2,train\nWho?,Me,r,dev\n')
    made = count(str(mic))
    assert (made["corpus"], made["dialogues"], made["utterances"]) == ("MIC", 2, 4)
    assert "38k" in dataset_stats.table([made])
    path.write_text(json.dumps([*holle, {**holle[2], "query": ""}]))
    assert count(str(path))["bad_records"] == 1
