"""Real clients against `cosmo serve`, and `canary guard` before a real model.

Oracle: the clients themselves. Each of them parses what the servers send, and fails where that is
no OpenAI API. All are slow: the clients start in an environment of their own.
"""

import json
import os
import subprocess

import pytest

from cosmo.__main__ import main as cosmo_main
from tests.clients.conftest import serving

pytestmark = pytest.mark.slow

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def talk():
    turns = ["Hi, how was the exam?", "I lost my key.", "What a day!"]
    return Task(dataset=[Sample(input=t, target="zzz") for t in turns],
                solver=generate(), scorer=includes())
"""


# The Canary is untrained: its labels mean nothing.
POLICY = """
[turn]
possibly_needs_caution = "pass"
probably_needs_caution = "pass"
needs_caution = "pass"
needs_intervention = "pass"
[answer]
needs_caution = "pass"
needs_intervention = "pass"
"""


@pytest.fixture(scope="module")
def cosmo(tmp_path_factory, canary_run):
    """Serve a Cosmo that was trained for two steps, guarded by a Canary; yield its address."""
    from tests.cosmo.conftest import SMALL

    folder = tmp_path_factory.mktemp("cosmo")
    run = ["train", *SMALL, f"--gin.MODEL_DIR={folder / 'run'}", "--gin.TRAIN_STEPS=2", "--quiet"]
    assert cosmo_main(run) == 0
    (folder / "policy.toml").write_text(POLICY)
    command = ("cosmo", "serve", f"--model={folder / 'run'}", "--port=0", "--slots=4")
    guard = (f"--canary={canary_run}", f"--policy={folder / 'policy.toml'}")
    with serving(*command, *guard, log=folder / "log") as address:
        yield address


def run_client(python: str, *command: str, folder, **environment: str) -> str:
    """Run a client in `folder`; return what it prints."""
    done = subprocess.run(
        [python, "-m", *command],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_llm_talks_over_several_turns_and_streams(cosmo, client_python, tmp_path):
    model = [{"model_id": "ours", "model_name": "run", "api_base": f"{cosmo}/v1"}]
    # JSON is YAML.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(model))
    env = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    ask = ("llm", "-m", "ours", "-o", "max_tokens", "8")
    streamed = run_client(client_python, *ask, "Hi Ann!", folder=tmp_path, **env)
    whole = run_client(
        client_python, *ask, "--no-stream", "-o", "temperature", "0", "Hi", folder=tmp_path, **env
    )
    again = run_client(client_python, *ask, "-o", "temperature", "0", "Hi", folder=tmp_path, **env)
    assert streamed.strip()
    assert whole == again  # a stream's text is the text


def test_inspect_ai_runs_a_task(cosmo, client_python, tmp_path):
    (tmp_path / "talk.py").write_text(TASK)
    run_client(
        client_python,
        *("inspect_ai", "eval", "talk.py", "--model=openai-api/ours/run", "--max-tokens=8"),
        *("--log-format=json", "--log-dir=logs", "--display=plain"),
        folder=tmp_path,
        OURS_API_KEY="none",
        OURS_BASE_URL=f"{cosmo}/v1",
    )
    (log,) = (tmp_path / "logs").glob("*.json")
    found = json.loads(log.read_text())
    assert found["status"] == "success"
    assert [s["output"]["choices"][0]["stop_reason"] for s in found["samples"]]
    assert len(found["samples"]) == 3
    assert found["stats"]["model_usage"]["openai-api/ours/run"]["input_tokens"] > 0


def test_the_guarded_api_answers_as_the_other_where_all_passes(cosmo):
    """Oracle: the answer at /v1, to the same request."""
    import openai

    asked = {"model": "run", "messages": [{"role": "user", "content": "Hi Ann!"}], "temperature": 0}
    plain = openai.OpenAI(base_url=f"{cosmo}/v1", api_key="none", max_retries=0)
    guarded = openai.OpenAI(base_url=f"{cosmo}/guard/v1", api_key="none", max_retries=0)
    wanted = plain.chat.completions.create(**asked).choices[0].message.content
    whole = guarded.chat.completions.create(**asked)
    chunks = list(guarded.chat.completions.create(**asked, stream=True))
    assert whole.choices[0].message.content == wanted
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert whole.guard["action"] == chunks[0].guard["action"] == "pass"
    label = plain.moderations.create(input="Hi Ann!").results[0].label
    assert whole.guard["label"] == label


def test_guard_before_a_real_model(client_python, canary_run, tmp_path):
    """llama.cpp's own server answers; the guard's fields and the whole text arrive."""
    import openai

    local = ("tools.local_model", "--port=0", "--slots=2", "--threads=2")
    with (
        serving(*local, log=tmp_path / "model", python=client_python) as upstream,
        serving(
            *("canary", "guard", f"--upstream={upstream}/v1", f"--canary={canary_run}", "--port=0"),
            f"--audit={tmp_path / 'audit.jsonl'}",
            log=tmp_path / "guard",
        ) as guard,
    ):
        client = openai.OpenAI(base_url=f"{guard}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "Say good morning to Ann."}]
        asked = {"model": "gemma-3-270m", "messages": messages, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == text
    assert text.strip()
    assert whole.guard["label"] == chunks[0].guard["label"]
    decisions = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len({d["request"] for d in decisions}) == 2
