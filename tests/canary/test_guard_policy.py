"""The guard's policy: the default, what a file may change, and one clear error for each mistake."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canary.guard import policy, settings
from cosmo.engine.base.errors import UserError
from cosmo.tasks import safety


def load(tmp_path, text):
    path = tmp_path / "p.toml"
    path.write_text(text)
    return policy.load(path)


def test_the_default_follows_the_paper():
    """Oracle: section 6.2 of ProsocialDialog: RoTs guide where the label is not casual."""
    rules = policy.load()
    assert [rules.turn[label] for label in safety.LABELS] == ["pass", *["guide"] * 3, "intervene"]
    assert rules.failure.canary == "closed" and rules.dialogue.unreadable == "refuse"


def test_a_file_changes_only_its_keys(tmp_path):
    rules = load(tmp_path, '[turn]\ncasual = "guide"\n[limits]\nlabel_seconds = 3\n')
    assert rules.turn["__casual__"] == "guide" and rules.limits.label_seconds == 3
    default = policy.load()
    assert rules.answer == default.answer and rules.limits.event_bytes == default.limits.event_bytes


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[trun]\n", "unknown table 'trun': did you mean turn"),
        ("turn = 3\n", "turn = 3: expected a table"),
        ('[turn]\ncasul = "pass"\n', "[turn]: unknown key 'casul': did you mean casual"),
        ('[turn]\ncasual = "stop"\n', "casual = 'stop': expected 'pass' or 'guide' or 'intervene'"),
        ('[answer]\ncasual = "guide"\n', "expected 'pass' or 'replace' or 'stop'"),
        ("[turn_thresholds]\ncasul = 0.5\n", "unknown label 'casul': did you mean casual"),
        ("[turn_thresholds]\ncasual = 1.5\n", "casual = 1.5: expected a probability, 0 to 1"),
        ("[answer_thresholds]\ncasual = nan\n", "casual = nan: expected a probability"),
        ("[limits]\nlabel_seconds = 0\n", "label_seconds = 0: expected a number above 0"),
        ("[limits]\nlabel_seconds = inf\n", "expected a number above 0"),
        ("[limits]\nevent_bytes = 1.5\n", "event_bytes = 1.5: expected a whole number"),
        ("[stream]\nenabled = 1\n", "enabled = 1: expected True or False"),
        ("[stream]\nsentence_chars = 5\n", "sentence_chars = 5: expected at least 40"),
        ('[texts]\nintervention = " "\n', "intervention is empty"),
        ('[texts]\nsystem_message = "Be kind."\n', "expected {rots} in it, once"),
        (
            '[routes]\npass = ["POST /v1/responses"]\n',
            "/responses' returns generated text",
        ),
        ('[routes]\npass = ["/v1/models"]\n', 'expected for example "GET /v1/models"'),
        ('[routes]\npass = ["GET /v1/*/x"]\n', "expected * as the last part alone"),
        ('[routes]\npass = ["GET /v1/*"]\n', "expected * as the last part alone"),
        ('[intervention]\nwebhook = "http://example.org/x"\n', "expected https, since example.org"),
        ('[intervention]\nwebhook = "ftp://x"\n', "expected https://HOST"),
        ("[turn\n", "the policy is no TOML"),
        ('[failure]\ncanary = "ajar"\n', "canary = 'ajar': expected 'closed' or 'open'"),
    ],
)
def test_a_mistake_gets_one_clear_error(tmp_path, text, wanted):
    with pytest.raises(UserError, match=re.escape(wanted)) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "p.toml") in str(caught.value) and "\n" not in str(caught.value).strip()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the policy .*none.toml"):
        policy.load(tmp_path / "none.toml")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.9.9.9"])
def test_a_webhook_on_this_machine_needs_no_https(host):
    policy.check_webhook(f"http://{host}:8000/x", "x")


shares = st.lists(st.floats(0, 1), min_size=5, max_size=5)


@given(shares, st.dictionaries(st.sampled_from(safety.LABELS), st.floats(0, 1)))
def test_the_most_severe_label_over_its_threshold_holds(values, thresholds):
    """Oracle: the rule, checked label by label."""
    found = dict(zip(safety.LABELS, values, strict=True))
    likeliest = max(found, key=found.__getitem__)
    held = policy.held_label(found, likeliest, thresholds)
    over = [label for label in thresholds if found[label] >= thresholds[label]]
    if over:
        assert held == max(over, key=safety.LABELS.index)
    elif len(thresholds) == 5:
        assert held == "__casual__"
    else:
        assert held not in thresholds
        assert found[held] == max(found[label] for label in found if label not in thresholds)


def test_settings_read_the_file_and_put_a_webhook_in_its_place(tmp_path):
    (tmp_path / "p.toml").write_text('[turn]\ncasual = "guide"\n')
    webhook = "https://example.org/call"
    rules = settings.GuardConfig(policy=str(tmp_path / "p.toml"), webhook=webhook).rules()
    assert rules.turn["__casual__"] == "guide" and rules.intervention.webhook == webhook
    with pytest.raises(UserError, match="expected https"):
        settings.GuardConfig(webhook="http://example.org/call").rules()
