"""Text of tokens as they come, fields of requests, dialogues of messages."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from cosmo.engine.web.errors import ApiError
from cosmo.serve import fields, texts
from cosmo.tasks import prost_text, vocabularies

PROST = "tasks/sample/prost/vocabulary.json"


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Three kinds: SentencePiece, SentencePiece with byte pieces, byte-level BPE with marks."""
    proto = sentencepiece_model_pb2.ModelProto()
    with open("tasks/sample/vocabulary.model", "rb") as file:
        proto.ParseFromString(file.read())
    proto.trainer_spec.byte_fallback = True
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    path = tmp_path_factory.mktemp("bytes") / "bytes.model"
    path.write_bytes(proto.SerializeToString())
    plain = vocabularies.load("tasks/sample/vocabulary.model")
    return {"plain": plain, "bytes": vocabularies.load(path), "bpe": vocabularies.load(PROST)}


def written(writer, ids):
    """What a writer shows, piece by piece."""
    return [*(writer.add(id) for id in ids), writer.finish()]


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["plain", "bytes", "bpe"]),
    text=st.text(max_size=20),
    numbers=st.lists(st.integers(0, 3000), max_size=20),
    stops=st.lists(st.sampled_from(["the", " t", "e", "😀", "é", " ⁇ ", "ab"]), max_size=3),
)
@example(kind="bytes", text="😀 é", numbers=[], stops=[])
@example(kind="bpe", text="a😀", numbers=[], stops=["😀"])
def test_text_as_it_comes_is_the_decoded_text_cut_at_the_first_stop(
    known, kind, text, numbers, stops
):
    """Oracle: `decode` of all ids at once, and `str.find`."""
    vocabulary = known[kind]
    # Whole characters, and then any ids, among them halves of characters and unknown ones.
    ids = [*vocabulary.encode(text), *(n for n in numbers if n != vocabulary.eos_id)]
    whole = vocabulary.decode(ids)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    writer = texts.Writer(vocabulary, stops)
    pieces = written(writer, ids)
    assert "".join(pieces) == (whole[: min(places)] if places else whole)
    assert writer.stopped == bool(places)


def test_no_half_of_a_character_is_shown(known):
    """Oracle: the character comes at its last byte."""
    for kind in ("bytes", "bpe"):
        vocabulary = known[kind]
        ids = vocabulary.encode("a😀b")
        pieces = written(texts.Writer(vocabulary), ids)
        assert len(ids) > 4 and "".join(pieces).strip() == "a😀b"
        assert not any("\ufffd" in piece for piece in pieces)


def test_the_beginning_of_a_stop_is_held_back(known):
    """Oracle: by hand; what turns out to be no stop comes after all."""
    vocabulary = known["plain"]
    ids = vocabulary.encode("I am here. The end. The day.")
    for stops, shown in (
        ([". The day"], "I am here. The end"),
        ([". The sun"], "I am here. The end. The day."),
        (["day."], "I am here. The end. The "),
        ([".", "am"], "I "),
    ):
        seen = ""
        writer = texts.Writer(vocabulary, stops)
        for piece in written(writer, ids):
            seen += piece
            assert shown.startswith(seen)
        assert seen == shown


def test_prosts_rules_come_apart_from_its_response(known):
    """Oracle: `prost_text.split_answer` of the whole; nothing shows while the rules are written."""
    vocabulary = known["bpe"]
    example = prost_text.ProstExample((), "That is not kind.", ("It is wrong to lie.",))
    ids = prost_text.target_ids(example, vocabulary)[:-1]
    writer = texts.ProstWriter(vocabulary)
    response = prost_text.gold_prefix_ids(example.rots, vocabulary)
    for number, id in enumerate(ids):
        piece = writer.add(id)
        assert (writer.rots() is None) == (number + 1 < len(response))
        assert not piece or number >= len(response)
    writer.finish()
    answer = prost_text.split_answer(vocabulary.decode(ids))
    assert (writer.rots(), writer.shown) == (answer.rots, answer.response)


def test_an_answer_of_prost_without_rules_shows_at_once(known):
    """Oracle: the paper's form for casual dialogues, the bare response."""
    vocabulary = known["bpe"]
    writer = texts.ProstWriter(vocabulary)
    assert "".join(written(writer, vocabulary.encode("Hi there"))) == "Hi there"
    assert writer.rots() == ()


def test_pieces_have_the_bytes_that_they_stand_for(known):
    """Oracle: the UTF-8 of the text, after the space that encoding puts before it."""
    for kind in ("bytes", "bpe"):
        vocabulary = known[kind]
        pieces = [texts.piece(vocabulary, id) for id in vocabulary.encode("Hello 😀 é")]
        assert b"".join(piece.data for piece in pieces) == " Hello 😀 é".encode()
    assert texts.piece(known["plain"], 1) == ("", b"")
    assert texts.piece(known["plain"], 99_999).text == known["plain"].decode([99_999])


# --- fields ---

LIMITS = fields.Limits(max_tokens=24, max_samples=4, beams=3)


def chat(**body):
    fields.check_names(body, fields.CHAT)
    return fields.wanted(body, LIMITS, chat=True)


@pytest.mark.parametrize(
    "body,param",
    [
        ({"n": 5}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"temprature": 1}, "temprature"),
        ({"top_k": 2**31}, "top_k"),
        ({"beams": 2}, "beams"),
        ({"beams": 3, "temperature": 1.0}, "temperature"),
        ({"beams": 3, "n": 4}, "n"),
        ({"beams": 3, "logprobs": True}, "logprobs"),
        ({"rots": "be kind"}, "rots"),
    ],
)
def test_wrong_fields_are_refused_by_name(body, param):
    """Oracle: OpenAI's documented types and limits; ours for fields of ours."""
    with pytest.raises(ApiError) as caught:
        chat(**body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in str(caught.value)


def test_what_asks_for_nothing_is_accepted():
    """Oracle: requests as OpenAI's clients send them; null counts as absent."""
    found = chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={}, user="u",
        presence_penalty=0, frequency_penalty=0.0, metadata={"a": "b"}, store=False, n=None,
        temperature=None, suffix=None, parallel_tool_calls=True,
    )  # fmt: skip
    assert (found.n, found.temperature, found.top_p, found.max_tokens) == (1, 1.0, 1.0, 24)
    assert chat(max_tokens=4096).max_tokens == 24
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == 5
    assert chat(seed=-1).seed == 0xFFFFFFFF and chat(seed=7).seed == 7
    assert chat(stop="x").stops == ("x",)
    assert (chat(top_p=0).temperature, chat(beams=3).temperature) == (0.0, 0.0)
    assert chat(temperature=1e-45).temperature == 0.0
    assert chat(logprobs=True, top_logprobs=3).logprobs == 3
    assert len({chat().seed for _ in range(9)}) > 1


def messages(*given, **extras):
    made = [{"role": role, "content": content} for role, content in given]
    return fields.dialogue({"messages": made, **extras})


@pytest.mark.parametrize(
    "given,extras,expected",
    [
        ([("user", "Hi")], {}, ("", "", ("Hi",))),
        ([("system", "At home."), ("user", "Hi")], {}, ("At home.", "", ("Hi",))),
        (
            [("system", "At home.\n\nYou are Bo.\n\nBe kind."), ("user", "Hi")],
            {},
            ("At home.", "You are Bo. Be kind.", ("Hi",)),
        ),
        (
            [("developer", "At home."), ("system", "You are Bo."), ("user", "Hi")],
            {},
            ("At home.", "You are Bo.", ("Hi",)),
        ),
        (
            [("system", "At home.\n\nYou are Bo."), ("user", "Hi")],
            {"narrative": "At sea."},
            ("At sea.", "You are Bo.", ("Hi",)),
        ),
        (
            [("system", "At home."), ("user", "Hi")],
            {"instruction": "You are Al."},
            ("At home.", "You are Al.", ("Hi",)),
        ),
        (
            [("assistant", "Yo"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")],
            {},
            ("", "", ("Yo", "a b", "c", "d")),
        ),
        ([("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], {},
         ("", "", ("ab",))),
    ],
)  # fmt: skip
def test_messages_become_situation_role_and_turns(given, extras, expected):
    """Oracle: the rule in docs/serve.md, by hand."""
    found = messages(*given, **extras)
    assert (found.narrative, found.instruction, found.turns) == expected


@pytest.mark.parametrize(
    "given,param",
    [
        ([], "messages"),
        ([("user", "a"), ("assistant", "b")], "messages"),
        ([("system", "a")], "messages"),
        ([("user", "a"), ("system", "b"), ("user", "c")], "messages[1].role"),
        ([("user", "  ")], "messages[0].content"),
        ([("user", None)], "messages[0].content"),
        ([("user", 3)], "messages[0].content"),
        ([("tool", "a")], "messages[0].role"),
        ([("robot", "a")], "messages[0].role"),
        ([("user", [{"type": "image_url", "image_url": {}}])], "messages[0].content[0]"),
        ([("user", "x" * 200_001)], "messages"),
    ],
)
def test_messages_that_no_dialogue_has_are_refused(given, param):
    """Oracle: the place of what is wrong."""
    with pytest.raises(ApiError) as caught:
        messages(*given)
    assert caught.value.param == param


def test_fields_of_messages_are_checked_too():
    """Oracle: names are ignored, tools refused, our own answers taken back as they came."""
    answer = {"role": "assistant", "content": "b", "refusal": None, "rots": ["Be kind."]}
    user = {"role": "user", "content": "a", "name": "Ann"}
    assert fields.dialogue({"messages": [user, answer, user]}).turns == ("a", "b", "a")
    for field in ({"tool_calls": [{}]}, {"colour": "red"}):
        with pytest.raises(ApiError, match=r"messages\[0\]"):
            fields.dialogue({"messages": [{**user, **field}]})


def test_prompts_are_texts_or_token_ids():
    """Oracle: OpenAI's four forms."""
    for prompt, expected in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ):
        assert fields.prompts({"prompt": prompt}, 10) == expected
    for prompt in ("", " ", [], [[]], [10], [0], [True], {"a": 1}, None, [["a"]], ["a"] * 65):
        with pytest.raises(ApiError, match="prompt"):
            fields.prompts({"prompt": prompt}, 10)


def test_moderations_take_texts_or_messages():
    """Oracle: OpenAI's forms, and ours for a dialogue."""
    spoken = [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]
    assert fields.dialogues({"input": "a"}, 3) == [("a",)]
    assert fields.dialogues({"input": ["a", "b"]}, 3) == [("a",), ("b",)]
    assert fields.dialogues({"messages": spoken}, 3) == [("a",)]
    for body in (
        {}, {"input": []}, {"input": ["a"] * 4}, {"input": [" "]}, {"input": 3},
        {"input": "a", "messages": spoken}, {"messages": spoken[:1]}, {"input": [{"type": "text"}]},
    ):  # fmt: skip
        with pytest.raises(ApiError):
            fields.dialogues(body, 3)
