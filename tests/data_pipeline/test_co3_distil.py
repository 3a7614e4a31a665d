# ruff: noqa: E501 -- one case, one line
"""The chain from a triple to a row of SODA, with a model played by hand."""

import dataclasses
import json
import pickle
import random
import time

import pytest

from data_pipeline.calls.requests import Rejected, Response
from data_pipeline.co3 import distil, postprocess, schema, triples
from data_pipeline.co3.triples import Triple
from tests.data_pipeline.co3_script import conversation, drive

TRIPLE = Triple("7", "PersonX moves on", "xNeed", "to take a step", 5, "valid", ("Ann", "", ""))
PLAIN = postprocess.Settings()


def model(**answers):
    """A model that answers well, but for the stages given otherwise."""

    def answer(request):
        scene = request.prompt.rpartition("scene between ")[2].partition(" with multiple turns")[0]
        x, _, y = scene.partition(" and ")
        good = {
            "narrative": "Ann took her first step on Monday. Her coach cheered.",
            "speaker": " her coach",
            "dialogue": conversation(8, x, distil.speakers.label(y)),
            "continuation": " Good bye now.",
            "human": " Yes",
            "moderation": Response(scores={"hate": 0.1}),
        }
        return answers.get(request.stage, good.get(request.stage, " Yes"))

    return answer


def stages(requests):
    return [request.stage for request in requests]


def test_a_record_from_a_triple():
    """Oracle: FORMATS.md's fields; the sentence of table 8."""
    settings = dataclasses.replace(PLAIN, ask_moderation=True)
    found, requests = drive(distil.distil(TRIPLE, settings), model())
    assert stages(requests) == [
        "narrative",
        "speaker",
        "dialogue",
        "moderation",
        "head",
        "relation_tail",
    ]
    row = schema.soda_row(found)
    new = row["PersonX"]
    assert new != "Ann" and row["literal"] == f"{new} took a step. {new} moves on."
    assert row["narrative"] == f"{new} took her first step on Monday. Her coach cheered."
    assert row["speakers"] == [new, "Coach"] * 4 and len(row["dialogue"]) == 8
    assert (row["head"], row["tail"]) == ("PersonX moves on", "to take a step")
    assert (row["original_index"], row["split"]) == (5, "valid")
    assert (row["head_answer"], row["pmi_head_answer"]) == ("Yes", "")
    origin = schema.provenance(found)
    assert origin["id"] == "7" and origin["prompts"] == PLAIN.prompts.version
    assert origin["attempts"] == {"narrative": 1, "dialogue": 1, "continuation": 0}
    assert origin["interlocutor"] == "her coach" and origin["scores"] == {"hate": 0.1}
    assert schema.from_row(row, json.loads(json.dumps(origin))) == found


def test_the_row_has_the_schema_of_the_published_rows(shared):
    """Oracle: the real rows: names, order and types of fields, in JSON and in Parquet."""
    found, _ = drive(distil.distil(TRIPLE), model())
    row = schema.soda_row(found)
    for line in (shared / "data/soda_rows.jsonl").read_text().splitlines():
        real = json.loads(line)
        assert list(row) == list(real)
        assert [type(value) for value in row.values()] == [type(value) for value in real.values()]
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist([real, row], schema=schema.parquet_schema())
        assert table.to_pylist() == [real, row]


@pytest.mark.parametrize(
    "answers, stage, reason, asked",
    [
        ({"narrative": ""}, "narrative", "empty narrative", 3),
        ({"speaker": ""}, "speaker", "no interlocutor", 2),
        ({"dialogue": ""}, "dialogue", "empty dialogue", 5),
        ({"dialogue": conversation(1)}, "turns", "fewer than 4 turns", 8),
        ({"dialogue": conversation(24)}, "turns", "more than 20 turns", 3),
        ({"dialogue": conversation(8) + "\nBob: I am here too."}, "speakers", "more than two speakers", 3),
        ({"dialogue": conversation(8, y="Dog")}, "human", "speaker is not human", 3),
        ({"dialogue": conversation(8, y="Zorblax"), "human": " No"}, "human", "speaker is not human", 4),
        ({"moderation": Response(scores={"violence": 0.9})}, "moderation", "moderation: violence", 4),
        ({"head": " No"}, "commonsense", "head is not in the narrative", 6),
    ],
)  # fmt: skip
def test_rejections_name_stage_and_reason_and_ask_no_more(answers, stage, reason, asked):
    """Oracle: by hand; what is local is checked before the model is asked again."""
    settings = dataclasses.replace(PLAIN, ask_moderation=True)
    found, requests = drive(distil.distil(TRIPLE, settings), model(**answers))
    assert isinstance(found, Rejected)
    assert (found.id, found.stage, found.reason) == ("7", stage, reason)
    assert len(requests) == asked
    assert found.record["row"]["head"] == TRIPLE.head
    json.dumps(found.record)


def test_a_record_kept_for_want_of_better_is_marked():
    """Oracle: four turns: fewer than wanted (6), and enough for the filter (4)."""
    found, _ = drive(distil.distil(TRIPLE), model(dialogue=conversation(4), continuation=""))
    assert found.marks == ("dialogue: too few turns",)
    assert schema.provenance(found)["marks"] == ["dialogue: too few turns"]


def test_what_is_not_to_be_asked_is_not():
    """Oracle: the settings."""
    settings = dataclasses.replace(PLAIN, ask_human=False, ask_commonsense=False)
    answer = model(dialogue=conversation(8, y="Zorblax"))
    found, requests = drive(distil.distil(TRIPLE, settings), answer)
    assert stages(requests) == ["narrative", "speaker", "dialogue"]
    assert found.head_answer == "" and found.human == {}


def test_canarys_labels_come_later():
    """Oracle: filtering again asks nobody, and names are replaced once."""
    found, _ = drive(distil.distil(TRIPLE), model())
    kept = dataclasses.replace(PLAIN, canary={"7": "__casual__"}, seed=9)
    assert postprocess.postprocess(found, kept) == found
    gone = dataclasses.replace(PLAIN, canary={"7": "__needs_intervention__"})
    assert postprocess.postprocess(found, gone).stage == "canary"


def test_the_same_answers_make_the_same_record():
    """Oracle: determinism, also of the generators run in turns."""
    twins = [dataclasses.replace(TRIPLE, id=str(i), names=("", "", "")) for i in range(4)]
    alone = [drive(distil.distil(t), model())[0] for t in twins]
    running = [distil.distil(t) for t in twins]
    requests = [next(r) for r in running]
    found = {}
    while len(found) < len(twins):
        for i in random.Random(0).sample(range(4), 4):
            if i not in found:
                answer = model()(requests[i])
                answer = Response(text=answer) if isinstance(answer, str) else answer
                try:
                    requests[i] = running[i].send(answer)
                except StopIteration as end:
                    found[i] = end.value
    assert [found[i] for i in range(4)] == alone
    assert len({record.x for record in alone}) == 4


RUBBISH = (
    "", " ", "\n\n\n", "{", '{"choices": [', "null", "Ann", "Ann:", ":", "Ann: Ann: Ann:", "\x00",
    "I'm sorry, but I can't help with that.", "\ud800", "A" * 9000, "a\n" * 500, "Ann: hi\n" * 300,
    "**", "1.\n2.\n3.", "(((((", "[[[", '"""', "{x} {narrative}", "Q: Is it?\nA:", "\u202e\u200b",
    "Coach: Yes.", "Ann: Hi.\nCoach: Hi.\nAnn: What a day.\nCoach: Indeed it is.", "No", "Yes", "%s",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_model_says_every_triple_ends(seed):
    """Oracle: a record of the schema or a rejection with a reason, after at most 20 requests."""
    generator = random.Random(seed)
    settings = dataclasses.replace(PLAIN, ask_moderation=True)

    def answer(request):
        if generator.random() < 0.6:
            return model()(request)
        return Response(
            text=generator.choice(RUBBISH),
            finish_reason=generator.choice(["stop", "length", "content_filter", ""]),
            logprobs=generator.choice([None, (), ({},), ({"Yes": -1.0, "No": -9.0},)]),
            scores=generator.choice([None, {}, {"hate": 0.2}]),
        )

    for i in range(10):
        triple = dataclasses.replace(TRIPLE, id=f"{seed}-{i}", names=("", "", ""))
        found, requests = drive(distil.distil(triple, settings), answer)
        assert len(requests) <= 20
        if isinstance(found, Rejected):
            assert found.stage and found.reason
        else:
            row = schema.soda_row(found)
            assert schema.soda_row(schema.from_row(row)) == row
            assert 4 <= len(row["dialogue"]) <= 20 and len(set(row["speakers"])) == 2


def test_real_triples_through_a_scripted_model(shared):
    """Oracle: each of the first 600 lines is a record or has a reason."""
    records = 0
    for number, triple in enumerate(triples.read(shared / "data/atomic_triples.jsonl")):
        if number == 600:
            break
        if isinstance(triple, Rejected):
            continue

        found, _ = drive(distil.distil(triple), model())
        assert isinstance(found, schema.Record) or found.reason
        records += isinstance(found, schema.Record)
    assert records > 150


def test_settings_and_records_travel():
    """Oracle: Beam and processes pickle them."""
    found, _ = drive(distil.distil(TRIPLE), model())
    assert pickle.loads(pickle.dumps(found)) == found
    settings = pickle.loads(pickle.dumps(PLAIN))
    assert postprocess.postprocess(found, settings) == found


def test_duplicates(shared):
    """Oracle: other names, case and punctuation make no other dialogue; other words do."""
    found, _ = drive(distil.distil(TRIPLE), model())
    twin, _ = drive(distil.distil(dataclasses.replace(TRIPLE, id="8", index=3)), model())
    other, _ = drive(distil.distil(TRIPLE), model(dialogue=conversation(9)))
    assert twin.x != found.x
    assert postprocess.duplicate_key(found) == postprocess.duplicate_key(twin)
    assert postprocess.duplicate_key(found) != postprocess.duplicate_key(other)
    third = [dataclasses.replace(found, dialogue=(f"Hi {n}.", "Bye.")) for n in ("Emily", "Bob")]
    assert postprocess.duplicate_key(third[0]) == postprocess.duplicate_key(third[1])
    keys = set()
    kept, gone = (
        postprocess.result_of(r, r.original_index).keep_first(keys) for r in (twin, found)
    )
    assert json.loads(kept["provenance"])["id"] == "8" and kept.keys() == {"soda", "provenance"}
    again = json.loads(gone["rejected"])
    assert (again["id"], again["stage"], again["reason"]) == ("7", "dedup", "duplicate dialogue")


@pytest.mark.parametrize(
    "field, value",
    [("dialogue", "a"), ("speakers", ["a", 3]), ("head", None), ("original_index", True)],
)
def test_rows_of_another_form(field, value, shared):
    """Oracle: the field's name is in the error."""
    row = json.loads((shared / "data/soda_rows.jsonl").read_text().splitlines()[0])
    with pytest.raises(ValueError, match=field):
        schema.from_row(row | {field: value})
    with pytest.raises(ValueError, match="speakers"):
        schema.from_row(row | {"speakers": row["speakers"][1:]})


def test_real_rows_pass_and_speed(shared, capsys):
    """Oracle: the five rows stay; the rate is printed, not judged (the target is 2,000 a second)."""
    rows = [json.loads(line) for line in (shared / "data/soda_rows.jsonl").open()]
    records = [schema.from_row(row, {"id": str(i)}) for i in range(60) for row in rows]
    start = time.process_time()
    done = [
        postprocess.postprocess(dataclasses.replace(r, id=str(i))) for i, r in enumerate(records)
    ]
    seconds = time.process_time() - start
    assert all(isinstance(record, schema.Record) for record in done)
    with capsys.disabled():
        print(f"\npost-processing: {len(done) / seconds:.0f} dialogues per CPU second")
