"""`cosmo serve` by CTranslate2: OpenAI's client, beside `cosmo.load` on the same folder."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading

import httpx2
import openai
import pytest

import cosmo
from cosmo.engine.base.errors import UserError
from cosmo.engine.checkpoints import any_format, convert
from cosmo.engine.infer import ctranslate2_scheduler
from cosmo.engine.web import app, run
from cosmo.serve import api, fields, server
from cosmo.serve.model import Served
from tests.cosmo.serve_parts import write_model
from tests.tiny_models import write_prost

LENGTHS = (24, 3, 17, 9, 24, 12, 1, 20)  # tokens that eight clients ask for


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory) -> str:
    """The model as a CTranslate2 folder."""
    pytest.importorskip("ctranslate2", reason="CTranslate2 is in the extra ct2")
    found = str(tmp_path_factory.mktemp("ct2") / "exported")
    convert.export_checkpoint(str(run_folder), found, format="ctranslate2", dtype="float32")
    return found


@pytest.fixture(scope="module")
def service(folder):
    # Without `backend`: the folder has its own.
    return server.open_service(server.ServeConfig(folder, name="tiny", slots=4, max_queue=16))


@pytest.fixture(scope="module")
def url(service):
    with run.background(api.application(service, hosts=app.allowed_hosts("127.0.0.1"))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    how = {"api_key": "any", "max_retries": 0, "timeout": 60}
    with openai.OpenAI(base_url=f"{url}/v1", **how) as client:
        yield client


@pytest.fixture(scope="module")
def model(folder):
    return cosmo.load(folder, batch_size=1, backend="ctranslate2")


def question(number: int) -> str:
    return f"Question {number}? " + "Tell me more. " * number


def chat(client, number=0, **settings):
    messages = [{"role": "user", "content": question(number)}]
    return client.chat.completions.create(model="tiny", messages=messages, **settings)


def test_greedy_answers_of_clients_at_once_are_those_of_the_python_api(client, model):
    """Oracle: `cosmo.load(..., backend="ctranslate2").generate` of each question alone."""

    def whole(number):
        made = chat(client, number, temperature=0, max_tokens=LENGTHS[number], logprobs=True)
        choice = made.choices[0]
        logprobs = [one.logprob for one in choice.logprobs.content]
        return choice.message.content, choice.finish_reason, sum(logprobs)

    def streamed(number):
        how = {"temperature": 0, "max_tokens": LENGTHS[number], "stream": True}
        chunks = [one for chunk in chat(client, number, **how) for one in chunk.choices]
        return "".join(one.delta.content or "" for one in chunks), chunks[-1].finish_reason

    numbers = range(len(LENGTHS))
    with concurrent.futures.ThreadPoolExecutor(2 * len(LENGTHS)) as pool:
        pieces = pool.map(streamed, numbers)
        for number, (text, finish, nats) in zip(numbers, pool.map(whole, numbers), strict=True):
            length = LENGTHS[number]
            (reply,) = model.generate([[question(number)]], max_new_tokens=length)
            assert text == reply.text
            if finish == "length":  # else the end token, which is no entry, has a score
                assert nats == pytest.approx(reply.score, abs=1e-3)
            assert next(pieces) == (text, finish)


def test_a_client_that_leaves_frees_its_slot(client, service):
    """Property: streams that are closed after a piece leave no answer in progress."""
    for _ in range(6):
        with chat(client, temperature=1.0, stream=True) as stream:
            next(iter(stream))
    assert chat(client, temperature=0, n=4).choices[3].message.content is not None
    counts = service.scheduler.counts
    assert (counts.active, counts.queued) == (0, 0)


def test_a_full_queue_is_status_429(client, service):
    """Property: with the scheduler held up, sixteen requests wait and the next is refused."""
    held = threading.Event()
    service.scheduler.run_exclusive(lambda: held.wait(60))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        try:
            waiting = [pool.submit(chat, client, temperature=0) for _ in range(16)]
            pause = threading.Event()
            while service.scheduler.counts.queued < 16:
                pause.wait(0.01)
            with pytest.raises(openai.RateLimitError, match="16 requests wait"):
                chat(client)
        finally:
            held.set()
        assert len({one.result().choices[0].message.content for one in waiting}) == 1


def test_the_deadline_is_status_504(folder):
    """Property: a request that waits longer is answered by an error, and leaves the queue."""
    service = server.open_service(server.ServeConfig(folder, name="tiny", deadline=0.2))
    held = threading.Event()
    with run.background(api.application(service)) as url:
        service.scheduler.run_exclusive(lambda: held.wait(60))
        body = {"model": "tiny", "prompt": "Hello"}
        made = httpx2.post(f"{url}/v1/completions", json=body, trust_env=False)
        assert made.status_code == 504 and made.json()["error"]["code"] == "deadline_exceeded"
        held.set()
    assert service.scheduler.counts.finished == {"cancelled": 1}


@pytest.mark.parametrize(
    "settings, param",
    [
        ({"seed": 1}, "seed"),
        ({"logprobs": True, "top_logprobs": 2, "temperature": 0}, "top_logprobs"),
        ({"extra_body": {"beams": 2}}, "beams"),
    ],
)
def test_fields_that_ctranslate2_has_not_are_status_400(client, settings, param):
    """Oracle: the list in docs/serve.md."""
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param


def test_likeliest_tokens_of_completions_are_refused():
    """Oracle: the field's name there, which is another one."""
    limits = fields.Limits(24, 4, backend="ctranslate2")
    with pytest.raises(
        api.ApiError, match="logprobs: this server answers by CTranslate2"
    ) as caught:
        fields.wanted({"logprobs": 3}, limits, chat=False)
    assert caught.value.code == "unsupported_parameter"
    # These ask for nothing that it lacks.
    for body in ({"logprobs": 0}, {"seed": 3, "temperature": 0}, {}):
        fields.wanted(body, limits, chat=False)


def test_the_other_routes_answer(client, url, service):
    """Oracle: the routes in docs/serve.md; the page learns from the list that a seed is refused."""
    (entry,) = client.models.list()
    assert (entry.id, entry.takes_seed, entry.beams) == ("tiny", False, 1)
    assert httpx2.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    assert "<html" in httpx2.get(f"{url}/", trust_env=False).text
    metrics = httpx2.get(f"{url}/metrics", trust_env=False).text
    assert "cosmo_compilations 0.0" in metrics and "cosmo_slots 4.0" in metrics
    chat(client, temperature=0)
    assert f"cosmo_steps {float(service.scheduler.counts.steps)}" in (
        httpx2.get(f"{url}/metrics", trust_env=False).text
    )


def test_a_run_is_converted_at_the_start(run_folder, model):
    """Oracle: the exported folder's answer; int8 differs in weights alone."""
    for backend in ("ctranslate2", "ctranslate2_int8"):
        config = server.ServeConfig(str(run_folder), name="tiny", backend=backend)
        service = server.open_service(config)
        assert isinstance(service.scheduler, ctranslate2_scheduler.Scheduler)
        with run.background(api.application(service)) as url:
            body = {"model": "tiny", "temperature": 0, "max_tokens": 8}
            body |= {"messages": [{"role": "user", "content": question(1)}]}
            made = httpx2.post(f"{url}/v1/chat/completions", json=body, trust_env=False).json()
        text = made["choices"][0]["message"]["content"]
        if backend == "ctranslate2":
            assert text == model.generate([[question(1)]], max_new_tokens=8)[0].text


def test_the_command_ends_well_after_sigterm(folder):
    """Oracle: an answer that is in progress is finished; exit code 0."""
    command = [sys.executable, "-m", "cosmo", "serve", f"--model={folder}", "--port=0", "--quiet"]
    # Set, so that the command does not start itself again: the signal is for this process.
    environment = {**os.environ, "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        url = process.stdout.readline().removeprefix("listening on ").strip()
        body = {"model": "exported", "prompt": "Hello", "temperature": 0, "stream": True}
        ask = httpx2.stream("POST", f"{url}/v1/completions", json=body, trust_env=False)
        with ask as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"beams": 2}, "beams=2: a server by CTranslate2 has no such setting"),
        ({"num_partitions": 2}, "num_partitions=2: a server by CTranslate2"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is of this engine's products"),
        ({"backend": "torch"}, "one of jax, ctranslate2, ctranslate2_int8"),
    ],
)
def test_flags_that_ctranslate2_has_not_are_found_before_the_weights(
    run_folder, monkeypatch, settings, fault
):
    """Oracle: the flag in the error; no weights are converted."""

    def fail(*args, **named):
        raise AssertionError("weights were read")

    monkeypatch.setattr(convert, "export_checkpoint", fail)
    monkeypatch.setattr(any_format, "restore_params", fail)
    config = {"backend": "ctranslate2", **settings}
    with pytest.raises(UserError, match=fault):
        server.open_model(server.ServeConfig(str(run_folder), **config))


def test_a_prost_is_no_model_of_ctranslate2(tmp_path):
    """Oracle: the networks that it computes."""
    pytest.importorskip("ctranslate2", reason="CTranslate2 is in the extra ct2")
    config = server.ServeConfig(str(write_prost(tmp_path)), backend="ctranslate2")
    with pytest.raises(UserError, match="no T5"):
        server.open_model(config)


def test_only_jax_takes_a_seed():
    """Oracle: samples of CTranslate2's threads follow one another."""
    found = {name: Served("m", None, None, backend=name).takes_seed for name in ("jax", "c")}
    assert found == {"jax": True, "c": False}
