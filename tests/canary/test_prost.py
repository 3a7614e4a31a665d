"""Prost in Python and by its verbs, over a tiny network with random weights.

Random weights answer at random; what is tested is whose rules of thumb an answer follows, how it
is scored, and that every door gives the same answer.
"""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from canary.prost import Prost, agent, evaluation
from canary.prost.__main__ import main
from canary.prost.cli import chat
from cosmo.engine.base.errors import UserError
from cosmo.engine.model import generate, held_params
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import prost_text
from cosmo.tasks.prost_text import ProstExample

DIALOGUES = [
    ["I want to scare my kids.", "Why would you do that?", "They never listen to me."],
    ["Hi there, how was your day?"],
    ["I borrow a bicycle without asking."],
]
ROT = "You should ask before you borrow something."
MARKS = re.compile("__rot__|__response__")


@dataclasses.dataclass(frozen=True)
class FixedCanary:
    """Gives one dialogue RoTs and a person's attention, and labels the others casual."""

    def chirp(self, dialogues, *, rots=True):
        from canary.module import Chirp

        grave = Chirp("__needs_intervention__", {}, (ROT,), True, "")
        casual = Chirp("__casual__", {}, (), False, "")
        return [grave if "bicycle" in turns[0] else casual for turns in dialogues]


def test_an_answer_after_given_rots_is_the_network_s(prost):
    """Oracle: `generate.predict` with the prefix as the answer's first tokens."""
    reply = prost.reply(DIALOGUES[2], rots=[ROT])
    vocabulary, model = prost.session.vocabulary, prost.session.model
    inputs = np.array([prost_text.history_ids(DIALOGUES[2], vocabulary).ids])
    prefix = prost_text.gold_prefix_ids([ROT], vocabulary)
    config = DecodingConfig(max_new_tokens=12)
    found = generate.predict(
        model, prost.session.params, inputs, config, prefix=jnp.array([prefix])
    )
    text = vocabulary.decode(np.asarray(found.tokens)[0, 0].tolist())
    assert reply.text == prost_text.split_answer(text).response
    assert reply.score == pytest.approx(float(found.scores[0, 0]), abs=1e-4)
    assert reply.rots == (ROT,)


def test_whose_rots_an_answer_follows(prost):
    """Property: the caller's, then Canary's, then the model's own; no RoTs means none at all."""
    steered = dataclasses.replace(prost, canary=FixedCanary())
    _, casual, grave = steered.reply(DIALOGUES)
    assert (grave.rots, grave.label, grave.needs_human) == ((ROT,), "__needs_intervention__", True)
    assert (casual.rots, casual.label, casual.needs_human) == ((), "__casual__", False)
    assert grave.text == prost.reply(DIALOGUES[2], rots=[ROT]).text
    assert casual.text == prost.reply(DIALOGUES[1], rots=[]).text
    other = steered.reply(DIALOGUES[2], rots=["It's kind to share."])
    assert other.rots == ("It's kind to share.",) and other.needs_human  # Canary is still asked
    own = prost.reply(DIALOGUES[2])
    assert own.label is None and own.needs_human is False


def test_an_answer_without_rots_has_no_marks(prost):
    """Property: however likely a mark is, an answer without RoTs holds none."""
    params = held_params.plain(prost.session.model, prost.session.params)
    params = jax.tree.map(jnp.asarray, params)
    marks = np.array(list(prost.session.vocabulary.marks.values()))
    # The network that likes marks best: their embeddings are the final norm's bias, scaled up.
    bias = params["decoder"]["decoder_norm"]["bias"]
    params["token_embedder"] = params["token_embedder"].at[marks].set(50 * bias)
    session = dataclasses.replace(prost.session, params=params)
    fond = dataclasses.replace(prost, session=session)
    assert fond.reply(DIALOGUES[1]).problem  # it writes marks where it may
    bare = fond.reply(DIALOGUES[1], rots=[])
    assert not MARKS.search(bare.text) and not bare.problem and bare.rots == ()


def test_a_batch_is_answered_as_its_dialogues_are(prost):
    """Oracle: one dialogue at a time; a string is a turn a line."""
    many = prost.reply(DIALOGUES, temperature=1.0, seed=3)
    alone = [prost.reply(turns, temperature=1.0, seed=3) for turns in DIALOGUES]
    assert [r.text for r in many] == [r.text for r in alone]
    assert prost.reply("\n".join(DIALOGUES[0])) == prost.reply(DIALOGUES[0])


def test_an_answer_does_not_depend_on_its_neighbours_rots(prost):
    """Oracle: the same dialogue alone; the longest RoTs leave 32 of 64 positions."""
    long = [ROT, "It's good to respect other people's things."]
    both = prost.reply(DIALOGUES[:2], rots=[[ROT], long], max_new_tokens=50)
    for turns, rots, reply in zip(DIALOGUES[:2], [[ROT], long], both, strict=True):
        assert reply.text == prost.reply(turns, rots=rots, max_new_tokens=50).text


def test_a_long_history_loses_its_oldest_tokens(prost):
    """Oracle: `prost_text.history_ids` keeps the last 64 ids, the network's positions."""
    turns = ["We talked about the weather and the sea."] * 9
    row = prost.row(turns)
    assert row.cut and len(row.input_ids) == 64
    assert list(row.input_ids) == prost_text.history_ids(turns, prost.session.vocabulary).ids[-64:]
    whole = prost_text.history_ids(turns, prost.session.vocabulary).ids
    assert prost.reply(turns).cut == len(whole) - 64 and not prost.reply(turns[:1]).cut


def test_rots_leave_room_for_the_response(prost):
    """Property: the last RoTs go until 32 of 64 positions are free; a single one must fit."""
    rots = [ROT, "It's good to respect other people's things.", "You should say thank you."] * 2
    kept = prost.reply(DIALOGUES[2], rots=rots).rots
    assert 0 < len(kept) < 6 and kept == tuple(rots[: len(kept)])
    with pytest.raises(UserError, match="room for 32 before its response"):
        prost.reply(DIALOGUES[2], rots=["never ever " * 30])


def test_odd_arguments_are_refused_before_anything_is_answered(prost, prost_run):
    """Property: one clear error, which names what is expected."""
    alone = Prost.load(str(prost_run), variant="response_only")
    for call, words in (
        (lambda: prost.reply([]), "empty list"),
        (lambda: prost.reply(["a", ["b"]]), "strings and lists"),
        (lambda: prost.reply(DIALOGUES, rots=[ROT]), "a list of 3 lists of strings"),
        (lambda: prost.reply("Hi.", rots=ROT), "a list of strings"),
        (lambda: prost.reply("Hi.", rots=["Be \ud83d."]), "not valid text (half a character)"),
        (lambda: prost.reply("Hi.", beams=3), "unknown setting 'beams'"),
        (lambda: prost.reply("Hi.", num_samples=4, temperature=1.0), "a reply is one answer"),
        (lambda: prost.reply("Hi.", beam_size=2, temperature=1.0), "beam search is deterministic"),
        (lambda: alone.reply("Hi.", rots=[ROT]), "follows no rules of thumb"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            call()
    assert alone.reply("Hi.").rots == ()
    settings = agent.Settings.find(str(prost_run), variant="response_only")
    with pytest.raises(UserError, match="follows no rules of thumb"):
        settings.with_session(prost.session, FixedCanary())


def test_a_checkpoint_that_is_no_prost_is_refused(run):
    """Oracle: Canary's run has a SentencePiece vocabulary, and a T5."""
    with pytest.raises(UserError, match="no rows for Prost's marks"):
        Prost.load(str(run), variant="rot_and_response")


def test_generation_settings_are_the_run_s_then_the_preset(prost_run, tmp_path):
    """Oracle: ParlAI's preset gen/blenderbot; the macros of the run where it has them."""
    assert agent.Settings.find(str(prost_run)).generation["max_new_tokens"] == 12
    preset = {"beam_size": 10, "min_length": 20, "block_ngram": 3, "context_block_ngram": 3}
    assert preset.items() <= agent.PRESET.items()
    assert agent.PRESET["length_penalty"] == 0.65 and agent.PRESET["search"] == "parlai"
    opened = dataclasses.replace(
        Prost.load(str(prost_run)), generation={"max_new_tokens": 30, **agent.PRESET}
    )
    assert opened.decoding(temperature=0.5).beam_size == 1  # samples are not searched for
    assert opened.decoding(max_new_tokens=8).min_length == 0
    assert opened.decoding().min_length == 20


EXAMPLES = [
    ProstExample(tuple(DIALOGUES[2]), "Does your friend know?", (ROT,), "a"),
    ProstExample(tuple(DIALOGUES[1]), "It was lovely, thanks!", (), "b"),
    ProstExample(tuple(DIALOGUES[0]), "Have you talked to them?", ("Be kind to kids.",), "c"),
]


@pytest.mark.parametrize("rots", ["own", "gold"])
def test_the_likelihood_is_of_the_response_alone(prost, rots):
    """Oracle: `generate.score` of prefix and response, less that of the prefix."""
    found = evaluation.measure(prost, EXAMPLES, prost.decoding(), rots)
    vocabulary, session = prost.session.vocabulary, prost.session
    score_of = jax.jit(generate.score, static_argnums=0)

    def score(example, targets):
        inputs = prost_text.history_ids(example.turns, vocabulary, 64).ids
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        arrays = (inputs, [0, *targets[:-1]], targets)
        padded = (np.pad(np.array([ids], np.int32), ((0, 0), (0, 64 - len(ids)))) for ids in arrays)
        batch = dict(zip(names, padded, strict=True))  # of one shape: one program
        return float(score_of(session.model, session.params, batch)["score"][0])

    for example, one in zip(EXAMPLES, found, strict=True):
        before = example.rots if rots == "gold" else one.reply.rots
        prefix = prost_text.gold_prefix_ids(before, vocabulary) if before else []
        response = [*vocabulary.encode(example.response), vocabulary.eos_id]
        wanted = score(example, [*prefix, *response]) - (score(example, prefix) if prefix else 0.0)
        assert one.log_likelihood == pytest.approx(wanted, abs=2e-3)
        assert one.tokens == len(response)


def test_numbers_of_a_report_are_by_hand():
    """Oracle: F1 of equal texts is 100, of disjoint ones 0; perplexity exp(12 / 8)."""
    replies = [agent.Reply("Does your friend know?", (), -1.0), agent.Reply("zebra", (), -1.0)]
    measured = [evaluation.Measured(reply, -6.0, 4) for reply in replies]
    made = evaluation.report(EXAMPLES[:2], measured)
    assert made["f1"] == pytest.approx(50.0) and made["bleu4"] == pytest.approx(50.0)
    assert made["perplexity"] == pytest.approx(np.exp(12 / 8)) and made["examples"] == 2


def test_tables_have_the_papers_rows_and_ours():
    """Oracle: tables 3 and 8 of Kim et al. 2022."""
    found = {"bleu4": 1.25, "f1": 22.5, "perplexity": 9.75}
    made = {evaluation.PROSOCIAL: found, f"{evaluation.PROSOCIAL} gold": {**found, "f1": 33.25}}
    text = evaluation.tables("rot_and_response", made)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Prost (Response w/ gold RoT) 4.51 32.78 6.16" in lines
    assert "this model: (Response w/ gold RoT) 1.25 33.25 9.75" in lines
    assert "this model: (RoT & Response) 9.75/22.50 - - - - - -" in lines
    assert any(line.startswith("PushShift Transformer 6.16/32.78 8.01/15.60") for line in lines)
    assert "do not compare" in text


def test_chat_answers_line_by_line(prost):
    """Property: [RESET] forgets, [END] leaves, a line that cannot be used costs itself alone."""
    lines = iter(["Hi!", "", "I am \ud83d here", "[RESET]", DIALOGUES[1][0], "[END]"])
    said = []
    turns = chat.talk(prost, {}, read=lambda prompt: next(lines), write=said.append)
    assert turns[0] == DIALOGUES[1][0] and len(turns) == 2
    text = "\n".join(said)
    assert "(conversation forgotten)" in text and "not valid text" in text


def test_a_line_of_other_bytes_costs_itself(prost_run, monkeypatch, capsys):
    """Property: the chat goes on after a line that is not UTF-8, and ends with exit code 0."""
    content = io.BytesIO(b"Hi!\ncaf\xe9\nBye!\n[END]\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content, encoding="utf-8"))
    assert main(["chat", f"--checkpoint={prost_run}"]) == 0
    out = capsys.readouterr().out
    assert out.count("Prost: ") == 2 and out.count("not valid text (half a character)") == 1


def test_a_mistake_in_flags_costs_no_loading(prost_run, run, monkeypatch, capsys):
    """Property: one error that names the flag, before any network is opened."""
    monkeypatch.setattr("cosmo.engine.infer.infer.SessionConfig.open", None)
    model = f"--checkpoint={prost_run}"
    for arguments, words in (
        (["chat", model, "--beam_size=2", "--temperature=1"], "beam search is deterministic"),
        (["reply", model, "--min_length=99", "Hi."], "min_length=99"),
        (["reply", model, "--max_new_tokens=65", "Hi."], "64 positions"),
        (["reply", model, "--banned_ids=5000", "Hi."], "vocabulary are 0 to 1007 (--banned_ids)"),
        (["reply", model, "--top_k=3", "Hi."], "set it above 0 (--temperature)"),
        (["reply", model, "--canary_vocabulary=x", "Hi."], "(--canary, --canary_vocabulary)"),
        (["reply", model, "--variant=response_only", f"--canary={run}", "Hi."], "(--canary"),
        (["reply", model, "--variant=response_only", "--rot=Be kind.", "Hi."], "(--rot"),
        (["reply", model, "--canary=/nowhere", "Hi."], "/nowhere: it does not exist"),
    ):
        assert main(arguments) == 1
        assert words in capsys.readouterr().err


def test_a_part_of_rejected_records_ends_nothing(prost_run, tmp_path, caplog):
    """Oracle: the ids of the records around it. Two of them are equal, which is a warning."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    turns = [["Hi."], ["Ho."], [], [""], ["Hi."], ["Hey."]]
    records = [{"id": name, "turns": t} for name, t in zip("aabcde", turns, strict=True)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["infer", f"--checkpoint={prost_run}", f"--input={source}", f"--output={output}"]
    with caplog.at_level("WARNING", logger="canary"):
        assert main([*command, "--batch_size=4", "--window=2"]) == 0
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == list("aade")
    assert "1 of 2 dialogues read together have the id of another one" in caplog.text
    rejected = tmp_path / "out.jsonl.rejected.jsonl"
    assert [json.loads(line)["line"] for line in rejected.read_text().splitlines()] == [3, 4]
    source.write_text('{"turns": []}\n')
    assert main([*command[:3], f"--output={tmp_path / 'none.jsonl'}"]) == 1


def test_several_rots_are_followed(prost, prost_run, capsys):
    """Oracle: `Prost.reply` with both RoTs."""
    rots = ["Be kind.", "Be fair."]
    assert main(["reply", f"--checkpoint={prost_run}", *(f"--rot={r}" for r in rots), "Hi."]) == 0
    out = capsys.readouterr().out
    assert f"Prost: {prost.reply('Hi.', rots=rots).text}\n" in out
    assert [line for line in out.splitlines() if "rule of thumb" in line] == [
        f"  (your rule of thumb: {rot})" for rot in rots
    ]


def test_a_file_is_answered_as_in_python(prost, prost_run, tmp_path, capsys):
    """Lines, rejects, and nothing to do the second time. Oracle: `Prost.reply`."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [json.dumps({"id": f"d{i}", "turns": turns}) for i, turns in enumerate(DIALOGUES)]
    source.write_text("\n".join([*records, '{"turns": []}']) + "\n")
    command = ["infer", f"--checkpoint={prost_run}", f"--input={source}", f"--output={output}"]
    assert main([*command, "--batch_size=4"]) == 0
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["d0", "d1", "d2"]
    assert [line["reply"] for line in lines] == [r.text for r in prost.reply(DIALOGUES)]
    assert "1 rejected" in capsys.readouterr().out
    assert main([*command, "--batch_size=4"]) == 0
    assert "complete" in capsys.readouterr().out
    assert main([*command, "--beam_size=2"]) == 1  # other settings: another output
    assert "was begun with" in capsys.readouterr().err


def test_eval_measures_the_samples(prost_run, tmp_path, capsys, monkeypatch):
    """Both tables, metrics.json and predictions.jsonl. Oracle: the sample's sizes."""
    command = ["eval", f"--checkpoint={prost_run}", "--data=tasks/sample", "--num_examples=4"]
    command += [f"--output={tmp_path}/eval", "--batch_size=4", "--max_new_tokens=6"]
    assert main([*command, "--task=prost_prosocial,prost_wizard"]) == 1
    assert "ProsocialDialog, published at https" in capsys.readouterr().err
    assert main([*command, "--task=prost_wizard,prost_empathetic"]) == 0
    out = capsys.readouterr().out
    assert "Table 8" in out and "Table 3" not in out
    found = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert {name: task["examples"] for name, task in found["tasks"].items()} == {
        "prost_wizard": 4,
        "prost_empathetic": 4,
    }
    assert len((tmp_path / "eval/predictions.jsonl").read_text().splitlines()) == 8
    # A stop in the second task keeps the first.
    measure, calls = evaluation.measure, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure", stopped)
        assert main([*command, "--task=prost_wizard,prost_empathetic"]) == 130
    assert "1 of 2 measurements were finished and are in" in capsys.readouterr().err
    found = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert list(found["tasks"]) == ["prost_wizard"]
    assert len((tmp_path / "eval/predictions.jsonl").read_text().splitlines()) == 4
    # One named twice is measured once.
    assert main([*command, "--task=prost_wizard, prost_wizard", "--variant=response_only"]) == 0
    assert len((tmp_path / "eval/predictions.jsonl").read_text().splitlines()) == 4
    capsys.readouterr()
    for flag, words in (
        ("--task=prost_zebra", "no such task: 'prost_zebra'"),
        ("--num_examples=-1", "num_examples=-1; it must be at least 1 (--num_examples)"),
    ):
        assert main([*command, "--task=prost_wizard", flag]) == 1
        assert words in capsys.readouterr().err
