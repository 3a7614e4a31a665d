"""A tiny T5 behind the server: OpenAI's own client, beside `cosmo.load` on the same weights."""

import concurrent.futures
import os
import signal
import subprocess
import sys

import httpx2
import openai
import pytest

import cosmo
from canary.guard.settings import GuardConfig
from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format
from cosmo.engine.web import app, run
from cosmo.serve import api, server
from tests.cosmo.serve_parts import write_model
from tests.tiny_models import write_prost

TALK = [
    {"role": "system", "content": "Two friends talk.\n\nYou are Bo."},
    {"role": "user", "content": "Hello there!"},
]
RECORD = {"narrative": "Two friends talk.", "instruction": "You are Bo.", "turns": ["Hello there!"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def service(folder):
    config = server.ServeConfig(str(folder), name="tiny", slots=4, beams=2, port=0)
    return server.open_service(config)


@pytest.fixture(scope="module")
def client(service):
    made = api.application(service, hosts=app.allowed_hosts("127.0.0.1"))
    with (
        run.background(made) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def model(folder):
    return cosmo.load(str(folder), batch_size=1)


def chat(client, **settings):
    return client.chat.completions.create(model="tiny", messages=TALK, **settings)


def text_of(client, **settings) -> dict[int, str]:
    """The text of each choice of a stream."""
    found: dict[int, str] = {}
    for chunk in chat(client, stream=True, **settings):
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return found


def test_greedy_answers_are_those_of_the_python_api(client, model):
    """Oracle: `cosmo.load(...).generate`, which decodes in a loop of its own."""
    (reply,) = model.generate([RECORD])
    made = chat(client, temperature=0, logprobs=True)
    choice = made.choices[0]
    assert choice.message.content == reply.text
    assert choice.message.role == "assistant"
    # The end token is no entry, so the sum is the whole score of an answer that has none.
    assert choice.finish_reason == "length" and made.usage.completion_tokens == 24
    total = sum(one.logprob for one in choice.logprobs.content)
    assert total == pytest.approx(reply.score, abs=1e-3)


def test_beams_are_those_of_the_python_api(client, model):
    """Oracle: `cosmo.load(...).generate` with the same beams."""
    (reply,) = model.generate([RECORD], beam_size=2)
    made = chat(client, n=2, extra_body={"beams": 2})
    assert [choice.message.content for choice in made.choices] == list(reply.texts)
    assert text_of(client, n=2, extra_body={"beams": 2}) == dict(enumerate(reply.texts))


def test_a_seed_gives_the_same_samples_whole_and_streamed(client):
    """Oracle: the same request once more; another seed gives other samples."""
    first = [choice.message.content for choice in chat(client, seed=1, n=3).choices]
    assert [choice.message.content for choice in chat(client, seed=1, n=3).choices] == first
    assert text_of(client, seed=1, n=3) == dict(enumerate(first))
    assert len(set(first)) == 3
    other = [choice.message.content for choice in chat(client, seed=2, n=3).choices]
    assert other != first


def test_answers_do_not_depend_on_who_else_asks(client):
    """Oracle: the same questions one by one; twelve clients share four slots."""
    questions = [[{"role": "user", "content": f"Question {n}?"}] for n in range(12)]

    def answer(messages):
        made = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0.8, seed=5, max_tokens=8
        )
        return made.choices[0].message.content

    alone = [answer(messages) for messages in questions]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(answer, questions)) == alone
    assert len(set(alone)) > 1


def test_completions_read_the_prompt_as_it_stands(client, model):
    """Oracle: the chat's answer to the dialogue whose input text the prompt is."""
    prompt = "Two friends talk. <sep> You are Bo. <sep> Hello there!"
    made = client.completions.create(model="tiny", prompt=prompt, temperature=0)
    assert made.choices[0].text == chat(client, temperature=0).choices[0].message.content
    assert made.usage.prompt_tokens == chat(client).usage.prompt_tokens
    streamed = client.completions.create(model="tiny", prompt=prompt, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == made.choices[0].text


def test_errors_are_those_that_the_client_knows(client):
    """Oracle: the client's own classes for OpenAI's statuses."""
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, n=100)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=TALK)
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="a")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_nothing_was_compiled_for_a_request(client, service):
    """Oracle: the scheduler's count of XLA's own events, after every kind of request."""
    chat(client, n=4, temperature=0.7, top_p=0.9, logprobs=True, top_logprobs=5, stop="z")
    chat(client, extra_body={"beams": 2, "narrative": "Elsewhere."})
    chat(client, extra_body={"top_k": 3}, max_tokens=3)
    assert service.scheduler.compilations == 0
    assert service.scheduler.counts.active == 0


# --- the command ---


def test_a_folder_without_vocabulary_costs_no_loading(tmp_path, monkeypatch):
    """Oracle: the weights are not read."""
    folder = write_model(tmp_path, vocabulary=False)

    def fail(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(any_format, "restore_params", fail)
    with pytest.raises(UserError, match="no vocabulary beside it"):
        server.open_service(server.ServeConfig(str(folder)))


@pytest.mark.parametrize(
    "settings,fault",
    [
        ({"deadline": 0.0}, "deadline=0.0"),
        ({"deadline": float("nan")}, "deadline=nan"),
        ({"beams": 0}, "beams=0"),
    ],
)
def test_settings_are_checked(settings, fault):
    """Oracle: the value in the error."""
    with pytest.raises(UserError, match=fault):
        server.ServeConfig("m", **settings)


def test_a_key_that_is_not_set_is_an_error(monkeypatch):
    """Oracle: the variable's name; a server without a key must not start by mistake."""
    monkeypatch.setenv("EMPTY", " ")
    monkeypatch.setenv("BYTES", "key\udcff")  # the byte 0xff, which no text of a header is
    for name in ("EMPTY", "NO_SUCH_VARIABLE", "BYTES"):
        with pytest.raises(UserError, match=name):
            server.ServeConfig("m", api_key_env=name).api_key()
    monkeypatch.setenv("KEY", "secret\n")
    assert server.ServeConfig("m", api_key_env="KEY").api_key() == "secret"


def test_models_are_named_after_their_folders():
    """Oracle: the name that a user would say."""
    for path, name in (
        ("/data/cosmo-xl/", "cosmo-xl"),
        ("/tmp/run/checkpoints/600", "run"),
        ("/tmp/run/best", "run"),
        ("gs://bucket/t5_xl", "t5_xl"),
        ("run", "run"),
    ):
        assert server._name_of(path) == name


def test_the_command_serves_until_sigterm(folder):
    """Oracle: its output, an answer, exit code 0; a second server does not get its port."""
    command = [sys.executable, "-m", "cosmo", "serve", f"--model={folder}", "--slots=1", "--quiet"]
    # Set, so that the command does not start itself again: the signal is for this process.
    environment = {**os.environ, "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
    with subprocess.Popen(
        [*command, "--port=0"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        url = process.stdout.readline().removeprefix("listening on ").strip()
        name = httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
        assert name == folder.name
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(UserError, match=f"port {port} at 127.0.0.1 is in use") as caught:
            server.serve(server.ServeConfig("/no/model", port=port))
        assert caught.value.settings == ("port",)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_wrong_setting_of_the_guard_is_found_before_the_model_is_loaded(tmp_path):
    """Oracle: the error is the setting's, although no model is there either."""
    for guard, wanted in (
        (GuardConfig(audit=str(tmp_path / "none" / "a.jsonl")), "cannot write"),
        (GuardConfig(policy=str(tmp_path / "none.toml")), "cannot read the policy"),
    ):
        config = server.ServeConfig("/no/model", canary="/no/canary", port=0, guard=guard)
        with pytest.raises(UserError, match=wanted):
            server.serve(config)


# --- Prost ---


@pytest.fixture(scope="module")
def prost(tmp_path_factory):
    """(client, service, agent) of a tiny Prost that writes rules of thumb."""
    config = server.ServeConfig(
        str(write_prost(tmp_path_factory.mktemp("prost"))), name="prost", slots=1, beams=2
    )
    service = server.open_service(config)
    with (
        run.background(api.application(service)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        yield client, service, service.model.prost


def test_prost_follows_the_rules_that_it_is_given(prost):
    """Oracle: `Prost.reply` with the same rules; streamed and whole are one text."""
    client, service, agent = prost
    turns, rots = ["I lied to my boss."], ["It is wrong to lie.", "Be kind."]
    asked = [{"role": "user", "content": turns[0]}]
    settings = {"model": "prost", "messages": asked, "temperature": 0}
    for given in (rots, []):
        reply = agent.reply(turns, rots=given, beam_size=1)
        body = {"extra_body": {"rots": given}}
        message = client.chat.completions.create(**settings, **body).choices[0].message
        assert message.content.strip() == reply.text
        assert tuple(message.rots) == reply.rots
        chunks = list(client.chat.completions.create(**settings, **body, stream=True))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(one.delta.content or "" for one in choices) == message.content
        found = [one.delta.rots for one in choices if getattr(one.delta, "rots", None) is not None]
        assert found == [given]
    assert service.scheduler.compilations == 0


@pytest.mark.parametrize("given", [None, [], ["It is wrong to lie.", "Be kind."]])
def test_prost_searches_for_an_answer_that_follows_rules(prost, given):
    """Oracle: `Prost.reply` with the same rules and beams; nothing is compiled for it."""
    client, service, agent = prost
    turns = ["I lied to my boss."]
    reply = agent.reply(turns, rots=given, beam_size=2)
    made = client.chat.completions.create(
        model="prost",
        messages=[{"role": "user", "content": turns[0]}],
        extra_body={"beams": 2} | ({} if given is None else {"rots": given}),
    )
    message = made.choices[0].message
    if not reply.problem:
        assert (message.content.strip(), tuple(message.rots)) == (reply.text, reply.rots)
    assert service.scheduler.compilations == 0


def test_prost_writes_rules_of_its_own(prost):
    """Oracle: `Prost.reply`, which reads the whole answer at once."""
    client, _, agent = prost
    turns = ["I lied to my boss."]
    reply = agent.reply(turns, beam_size=1)
    made = client.chat.completions.create(
        model="prost", messages=[{"role": "user", "content": turns[0]}], temperature=0
    )
    message = made.choices[0].message
    if not reply.problem:  # random weights write odd forms, which are cut where they go wrong
        assert (message.content.strip(), tuple(message.rots)) == (reply.text, reply.rots)
    assert "__rot__" not in message.content and "__response__" not in message.content
