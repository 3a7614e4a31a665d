"""No character of a stream reaches the client before its sentence has passed."""

import asyncio
import json

import pytest

from cosmo.engine.web.app import application
from tests.canary import guard_doubles as doubles
from tests.canary import guard_fuzz as fuzz
from tests.canary.guard_doubles import EVENTS, JSON, Memory, Script, changed, delta, sse

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
REPLACED = "I would rather not say that."


def asked(form, **more):
    words = (
        {"messages": [{"role": "user", "content": "Hi"}]} if form == "chat" else {"prompt": "Hi"}
    )
    return {"model": "m", **words, **more}


def app(up, labels=None, rules=None, log=None, **more):
    return application(doubles.guard(up, labels, rules, log, **more).routes(), api_key=None)


def ask(up, labels=None, rules=None, log=None, form="chat", on_bytes=None, **fields):
    """(status, headers, body, error) of one request."""
    made = app(up, labels, rules, log)
    work = doubles.request(made, PATHS[form], asked(form, **fields), on_bytes=on_bytes)
    return asyncio.run(work)


def delivered(values):
    """{(choice, field): text}, {choice: calls}, {choice: finish_reason} of a stream's chunks."""
    texts, calls, ends = {}, {}, {}
    for value in values:
        for one in value.get("choices", []) if isinstance(value, dict) else []:
            fields = dict(one.get("delta", {"text": one.get("text", "")}))
            for call in fields.pop("tool_calls", []):
                function = call["function"]
                calls.setdefault(one["index"], []).append((function["name"], function["arguments"]))
            for field, text in fields.items():
                if field != "role" and text:
                    place = one["index"], field
                    texts[place] = texts.get(place, "") + text
            if one["finish_reason"]:
                ends[one["index"]] = one["finish_reason"]
    return texts, calls, ends


def check(seed):
    """One fuzzed stream. Oracle: `Watch`, and the texts that the stream was made of."""
    stream = fuzz.make(seed)
    recorder = fuzz.Recorder(seed)
    watch = fuzz.Watch(recorder)
    status, _, _, _ = ask(
        fuzz.answer(stream), recorder, form=stream.form, on_bytes=watch, stream=True, n=stream.count
    )
    assert status == 200 and not watch.leaks, f"seed {seed}: {watch.leaks[:5]} leaked"
    texts, calls, ends = delivered(watch.values)
    for place, text in texts.items():
        wanted = stream.texts.get(place, "")
        if ends.get(place[0]) == "content_filter":
            text = text.removesuffix(REPLACED).removesuffix(" ")  # the space between
        if not stream.whole:
            text = text.removesuffix("\ufffd")  # half a character, where the stream broke off
        assert wanted.startswith(text), f"seed {seed}: {place} got another text"
        assert fuzz.BAD not in text
    values = [json.loads(arguments) for made in stream.calls.values() for _, arguments in made]
    everything = "".join([*stream.texts.values(), *fuzz.strings(values)])
    # Nothing is lost of a stream that is whole and good.
    if stream.whole and fuzz.BAD not in everything:
        assert texts == {place: text for place, text in stream.texts.items() if text}, seed
        assert calls == stream.calls, seed
        assert watch.values[-1] == "[DONE]"
    return len("".join(texts.values())), "content_filter" in ends.values()


def test_fuzzed_streams_leak_nothing():
    results = [check(seed) for seed in range(150)]
    assert sum(size for size, _ in results) > 5_000  # characters did pass
    assert any(stopped for _, stopped in results)


@pytest.mark.slow
def test_ten_thousand_fuzzed_streams_leak_nothing():
    results = [check(seed) for seed in range(10_000)]
    passed, stopped = sum(size for size, _ in results), sum(stop for _, stop in results)
    print(f"{len(results):,} streams: {passed:,} characters passed, {stopped:,} were stopped")


def test_the_watch_sees_a_leak():
    """Oracle of the oracle: a guard that hands bytes on is caught."""
    found = 0
    for seed in range(20):
        stream = fuzz.make(seed)
        watch = fuzz.Watch(fuzz.Recorder(seed))
        for piece in doubles.sse(*[delta(content=text) for text in stream.texts.values()]):
            watch(piece)
        found += bool(watch.leaks)
    assert found > 10


@pytest.mark.parametrize(
    "text", ["All is fine here. Really, it is.", "It is fine here. A nasty one. Then."]
)
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_whole_answer_is_judged_as_a_stream(form, text):
    """Oracle: the same text streamed."""
    if form == "chat":
        whole = doubles.body(text)
        stream = sse(*[delta(content=one) for one in text], delta(finish="stop"))
    else:
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        whole = json.dumps({"choices": [choice]}).encode()
        stream = sse(*[{"choices": [{"index": 0, "text": one}]} for one in text])
        stream[-1:] = sse({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    one, two = Memory(), Memory()
    _, _, body, _ = ask(Script(lambda _: (200, JSON, [whole])), log=one, form=form)
    choice = json.loads(body)["choices"][0]
    _, _, data, _ = ask(Script(lambda _: (200, EVENTS, stream)), log=two, form=form, stream=True)
    texts, _, ends = delivered(doubles.events(data))
    field = "content" if form == "chat" else "text"
    assert texts == {(0, field): choice["message"]["content"] if form == "chat" else choice["text"]}
    assert ends[0] == choice["finish_reason"]
    labels = [(record["label"], record["action"]) for record in one.of("answer")]
    assert labels == [(record["label"], record["action"]) for record in two.of("answer")]
    told = [
        label
        for value in doubles.events(data)
        if isinstance(value, dict)
        for label in value.get("guard", {}).get("answer_labels", [])
    ]
    assert told == json.loads(body)["guard"]["answer_labels"] and len(told) == len(labels)


def test_a_replaced_sentence_ends_the_answer():
    text = "It is fine here. A nasty one now. Then more of it."
    _, _, body, _ = ask(Script(lambda _: (200, JSON, [doubles.body(text)])))
    choice = json.loads(body)["choices"][0]
    assert choice["message"]["content"] == "It is fine here. " + REPLACED
    assert choice["finish_reason"] == "content_filter"


def test_a_stopped_sentence_gets_no_text():
    rules = changed(answer={doubles.CAUTION: "stop"})
    _, _, body, _ = ask(
        Script(lambda _: (200, JSON, [doubles.body("It is fine here. A nasty one.")])), rules=rules
    )
    choice = json.loads(body)["choices"][0]
    assert choice["message"]["content"] == "It is fine here."
    assert choice["finish_reason"] == "content_filter"


def test_a_stopped_stream_ends_the_upstreams_call():
    """Oracle: an upstream that would go on for ever is closed after the bad sentence."""

    def endless(_):
        def pieces():
            yield from sse(delta(content="A nasty thing to say. "), done=False)
            while True:
                yield 0.001
                yield from sse(delta(content="More. "), done=False)

        return 200, EVENTS, pieces()

    up = Script(endless)
    _, _, data, _ = ask(up, stream=True)
    assert up.closed and not up.finished
    assert doubles.events(data)[-1] == "[DONE]" and b"More" not in data


def test_one_choice_may_end_and_another_go_on():
    stream = sse(
        delta(0, content="A nasty thing to say. "), delta(1, content="A kind thing to say. "),
        delta(0, content="More of the same. "), delta(1, content="And another kind thing."),
        delta(0, "stop"), delta(1, "stop"),
    )  # fmt: skip
    _, _, data, _ = ask(Script(lambda _: (200, EVENTS, stream)), stream=True, n=2)
    texts, _, ends = delivered(doubles.events(data))
    assert texts[1, "content"] == "A kind thing to say. And another kind thing."
    assert texts[0, "content"] == REPLACED and ends == {0: "content_filter", 1: "stop"}


def test_arguments_of_tools_are_judged_without_their_escapes():
    def ask_for(arguments):
        functions = [{"name": "say", "arguments": arguments[:11]}, {"arguments": arguments[11:]}]
        calls = [{"index": 0, "id": "t", "function": function} for function in functions]
        stream = sse(*[delta(tool_calls=[call]) for call in calls], delta(finish="tool_calls"))
        _, _, data, _ = ask(Script(lambda _: (200, EVENTS, stream)), stream=True)
        return data, *delivered(doubles.events(data))

    data, texts, calls, ends = ask_for(r'{"text": "\u006easty"}')  # "nasty"
    assert not calls and ends == {0: "content_filter"} and b"006easty" not in data
    assert texts == {(0, "content"): REPLACED}
    _, _, calls, ends = ask_for(r'{"text": "\u0074asty"}')  # "tasty"
    assert calls == {0: [("say", r'{"text": "\u0074asty"}')]} and ends == {0: "tool_calls"}


def test_log_probabilities_leave_with_their_text():
    def token(text):
        other = {"token": "awful", "logprob": -3.0, "bytes": None}
        return {
            "token": text,
            "logprob": -0.5,
            "bytes": list(text.encode()),
            "top_logprobs": [other],
        }

    words = ["It", " is", " fine", " here", ".", " A", " nasty", " one", "."]
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    choice["logprobs"] = {"content": [token(word) for word in words]}
    data = json.dumps({"choices": [choice]}).encode()
    for alternatives in ("drop", "pass"):
        rules = changed(stream={"alternatives": alternatives})
        _, _, body, _ = ask(Script(lambda _: (200, JSON, [data])), rules=rules)
        found = json.loads(body)["choices"][0]["logprobs"]["content"]
        assert [one["token"] for one in found] == words[:5]
        assert (b"awful" in body) == (alternatives == "pass") and b"nasty" not in body


def test_bytes_of_a_token_are_those_of_its_text():
    """Oracle: the text that was judged; a token's bytes spell another one, and NaN is no JSON."""
    token = {"token": "Hello", "logprob": float("nan"), "bytes": list(b"a nasty secret")}
    choice = {"index": 0, "message": {"content": "Hello there."}, "finish_reason": "stop"}
    choice["logprobs"] = {"content": [token]}
    data = json.dumps({"choices": [choice], "usage": {"total_tokens": float("inf")}}).encode()
    _, _, body, _ = ask(Script(lambda _: (200, JSON, [data])))

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(body, parse_constant=refuse)["choices"][0]["logprobs"]["content"]
    shown = {"token": "Hello", "logprob": None, "bytes": list(b"Hello"), "top_logprobs": []}
    assert found == [shown]
