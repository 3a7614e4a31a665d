"""The chat page in a real Chromium, against a server whose answers are scripted."""

import json
import pathlib
import re
import time
import urllib.request

import pytest

from cosmo import chat
from cosmo.engine.base.errors import UserError
from cosmo.serve import page as served_page
from cosmo.tasks import safety
from tests.cosmo import serve_parts, test_serve_api
from tools import page_screenshots, page_server

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is in the extra dev")
if page_screenshots.chromium() is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

expect = sync_api.expect
expect.set_options(timeout=10_000)
ROOT = pathlib.Path(__file__).resolve().parents[2]
CITY = "I moved to a new city last week and know nobody here."
BOSS = "I told my boss that I was ill, and went to a concert instead."
ALONE = "Nobody would notice if I was not here any more."
GUARD, PLAIN = "/guard/v1/chat/completions", "/v1/chat/completions"
SYSTEM = {"role": "system", "content": f"{chat.SITUATION}\n\n{chat.ROLE}"}
NAMES = (
    "Casual",
    "Possibly needs caution",
    "Probably needs caution",
    "Needs caution",
    "Needs intervention",
)
BOSS_ROTS = ["You shouldn't lie to your boss.", "It's better to ask for a day off."]


@pytest.fixture(scope="module")
def browser():
    """One Chromium for this file."""
    with sync_api.sync_playwright() as playwright:
        browser = page_screenshots.launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    """One scripted server for this file: (script, address)."""
    script = page_server.Script()
    with page_server.running(script) as url:
        yield script, url


@pytest.fixture
def script(server):
    """The server's script, as new."""
    server[0].__init__()
    return server[0]


@pytest.fixture
def open_page(browser, server, script):
    """Open the page. At the end: no request left the server, no error or violation was logged."""
    address, contexts, problems, outside = server[1], [], [], []

    def refuse(route):
        outside.append(route.request.url)
        route.abort()

    def note(message):
        # The browser itself logs every response of 400 and above, and a lost connection.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            problems.append(message.text)

    def opened(width=1280, height=860, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        expect(page.locator("#model")).to_contain_text(
            page_server.MODEL if script.key is None else "API key"
        )
        return page

    yield opened
    for context in contexts:
        context.close()
    assert (problems, outside) == ([], [])


def say(page, text: str):
    """Send a turn and wait for the end of the answer and its labels."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    ended(page)


def ended(page):
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("text=Canary is reading")).to_have_count(0)


def guard(page, value: str):
    page.check(f"#guard input[value={value}]", force=True)


def texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def bodies(script, path: str) -> list[dict]:
    return [body for where, body in script.requests if where == path]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_dialogue_is_held(open_page, script):
    """Oracle: the scripted answer, seen in part before it is whole; the messages sent."""
    script.held = True
    page = open_page()
    page.fill("#message", CITY)
    page.press("#message", "Enter")
    answer = page.locator(".model-turn .text")
    whole = page_server.ANSWERS["new city"][0]
    expect(answer).to_contain_text("That sounds")
    part = answer.inner_text()
    assert whole.startswith(part) and part != whole
    expect(page.locator("#stop")).to_be_visible()
    script.held = False
    expect(answer).to_have_text(whole)
    ended(page)
    say(page, "I have found a job.")
    assert texts(page, ".model-turn .text")[1] == page_server.ANSWERS["a job"][0]
    first, second = bodies(script, GUARD)
    assert first["messages"] == [SYSTEM, user(CITY)]
    assert second["messages"] == [SYSTEM, user(CITY), assistant(whole), user("I have found a job.")]
    assert (first["temperature"], first["top_p"], first["stream"]) == (1.0, 0.95, True)
    assert "narrative" not in first
    assert texts(page, ".user .chip") == ["Casual", "Casual"]
    assert whole not in page.inner_text("#announcer")
    assert page_server.ANSWERS["a job"][0] in page.inner_text("#announcer")  # read once, whole


def test_a_caution_is_shown_with_its_rots(open_page, script):
    """Oracle: the scripted verdict."""
    page = open_page()
    say(page, BOSS)
    assert texts(page, ".user .chip") == ["Needs caution"]
    assert texts(page, ".user .rots li") == BOSS_ROTS
    assert "gave the model these rules of thumb" in page.inner_text(".user .note")
    assert texts(page, ".model-turn .chip") == ["Casual"]
    assert "3 sentences of the answer checked" in page.inner_text(".model-turn .note")
    page.click(".user summary")
    shares = texts(page, ".user .shares .percent")
    assert len(shares) == 5 and shares[3] == "81 %"  # 0.86 of 1.06


def test_five_labels_differ_in_text_colour_and_bars(open_page, script):
    """Oracle: the order of `safety.LABELS`."""
    page = open_page()
    marks = []
    for rank, label in enumerate(safety.LABELS):
        script.verdict = {**page_server.verdict(""), "label": label}
        say(page, f"turn {rank}")
        turn = page.locator(".user").last
        assert turn.locator(".chip").inner_text() == NAMES[rank]
        assert turn.locator(".bars .on").count() == rank
        said = turn.locator(".said")
        marks.append(said.evaluate("node => getComputedStyle(node).borderLeftColor"))
    assert len(set(marks)) == 5


def test_an_intervention_is_prominent(open_page, script):
    """Oracle: the set text, and an alert."""
    page = open_page()
    say(page, ALONE)
    alert = page.locator(".human[role=alert]")
    expect(alert).to_contain_text("A person should look at this dialogue")
    expect(alert).to_contain_text("The model was not asked")
    assert texts(page, ".model-turn .text") == [page_server.SET_TEXT]
    assert texts(page, ".model-turn h3") == ["Guard"]
    guard(page, "off")
    say(page, ALONE)
    expect(alert.last).to_contain_text("The guard is off")


def test_guard_off_labels_by_moderations(open_page, script):
    """Oracle: the requests, and the scripted verdicts of turn and answer."""
    page = open_page()
    guard(page, "off")
    say(page, BOSS)
    plain = page_server.ANSWERS["boss"][1]
    assert [path for path, _ in script.requests].count(GUARD) == 0
    assert [body["messages"] for body in bodies(script, "/v1/moderations")] == [
        [user(BOSS)],
        [user(BOSS), assistant(plain)],
    ]
    assert texts(page, ".user .chip") == ["Needs caution"]
    assert texts(page, ".user .rots li") == BOSS_ROTS
    assert texts(page, ".model-turn .chip") == ["Probably needs caution"]
    say(page, "error label")
    assert "Not labelled. The server failed (status 503): Canary is loading." in texts(
        page, ".user .note"
    )[1].replace("\n", " ")


def test_side_by_side(open_page, script):
    """Oracle: both scripted answers; the next turn follows the guarded one."""
    page = open_page()
    guard(page, "both")
    say(page, BOSS)
    guarded, plain = page_server.ANSWERS["boss"]
    assert texts(page, ".model-turn .text") == [guarded, plain]
    assert texts(page, ".model-turn h3") == ["With the guard", "Without the guard"]
    assert texts(page, ".model-turn .chip") == ["Casual", "Probably needs caution"]
    (first,), (second,) = bodies(script, GUARD), bodies(script, PLAIN)
    assert first == second  # the same turn, settings and seed
    say(page, CITY)
    assert assistant(guarded) in bodies(script, PLAIN)[1]["messages"]


def test_without_canary_there_is_no_guard(open_page, script):
    """Oracle: disabled switches with a reason, and no request for a label."""
    script.canary = False
    page = open_page()
    expect(page.locator("#guard input:disabled")).to_have_count(3)
    assert "--canary=PATH" in page.inner_text("#lead")
    say(page, BOSS)
    assert {path for path, _ in script.requests} == {PLAIN}
    assert page.locator(".chip:visible").count() == 0


def test_reset_clears_and_undo_brings_back(open_page, script):
    """Oracle: the messages of the next request."""
    page = open_page()
    page.fill("#situation", "Two friends meet.")
    say(page, CITY)
    page.click("#reset")
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#message")).to_be_focused()
    page.click("text=Undo")
    expect(page.locator(".exchange")).to_have_count(1)
    say(page, BOSS)
    assert len(bodies(script, GUARD)[1]["messages"]) == 4
    page.click("#reset")
    say(page, CITY)
    expect(page.get_by_text("Undo")).to_have_count(0)
    system = {"role": "system", "content": f"Two friends meet.\n\n{chat.ROLE}"}
    assert bodies(script, GUARD)[2]["messages"] == [system, user(CITY)]


def test_reset_while_an_answer_is_written(open_page, script):
    """Oracle: the server sees the client leave, and the next dialogue is not disturbed."""
    page = open_page()
    page.fill("#message", "never ends")
    page.press("#message", "Enter")
    expect(page.locator(".model-turn .text")).to_contain_text("I am glad")
    page.click("#reset")
    say(page, CITY)
    assert texts(page, ".model-turn .text") == [page_server.ANSWERS["new city"][0]]
    assert script.left == 1


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_the_text_so_far(how, open_page, script):
    """Oracle: the first words of the scripted answer; the server sees the client leave."""
    page = open_page()
    page.fill("#message", "never ends")
    page.press("#message", "Enter")
    expect(page.locator(".model-turn .text")).to_contain_text("I am glad")
    page.fill("#message", "a draft")
    page.press("#message", "Enter")  # not sent while an answer is written
    page.press("#message", "Escape") if how == "Escape" else page.click("#stop")
    ended(page)
    assert texts(page, ".model-turn .text") == ["I am glad"]
    assert texts(page, ".ending") == ["You stopped the answer here."]
    expect(page.locator("#message")).to_have_value("a draft")
    expect(page.locator("#message")).to_be_focused()
    say(page, CITY)
    assert bodies(script, GUARD)[1]["messages"][2] == assistant("I am glad")
    assert script.left == 1


FAILURES = {
    "error 400": "The server refuses this request (status 400): temperature must be at least 0",
    "error 429": "The server is busy. Try again in 7 seconds.",
    "error 500": "The server failed (status 500): the model failed.",
    "offline": "The server cannot be reached.",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_refused_turn_is_kept(text, open_page, script):
    """Oracle: the words beside the turn; the text is in the box; the next try replaces the turn."""
    script.failures = 1
    page = open_page()
    page.context.set_offline(text == "offline")
    say(page, text)
    expect(page.locator(".model-turn .failure[role=alert]")).to_contain_text(FAILURES[text])
    expect(page.locator("#message")).to_have_value(text)
    page.context.set_offline(False)
    page.click("text=Try again")
    ended(page)
    expect(page.locator(".exchange")).to_have_count(1)
    assert texts(page, ".model-turn .text") == [page_server.DEFAULT_ANSWER]
    expect(page.locator("#message")).to_have_value("")
    assert bodies(script, GUARD)[-1]["messages"] == [SYSTEM, user(text)]


CUTS = {
    "cut": "The answer was cut: the connection ended too soon. The text so far is kept.",
    "stream error": "The server stopped in the middle: the device was lost. The text so far",
    "garbage": "The server sent something that is not an answer.",
}


@pytest.mark.parametrize("text", CUTS)
def test_a_cut_answer_is_kept_and_named(text, open_page, script):
    """Oracle: the first words of the scripted answer, and the words below them."""
    page = open_page()
    # Chromium drops what it has not handed on when a connection breaks: so break it later.
    script.held = text != "garbage"
    page.fill("#message", text)
    page.press("#message", "Enter")
    if script.held:
        expect(page.locator(".model-turn .text")).to_contain_text("I am glad")
    script.held = False
    ended(page)
    expect(page.locator(".model-turn .failure")).to_contain_text(CUTS[text])
    kept = [] if text == "garbage" else ["I am glad"]
    assert [found for found in texts(page, ".model-turn .text") if found] == kept
    expect(page.locator("#message")).to_have_value("" if kept else text)
    page.fill("#message", "")
    page.click(f"text={'Answer again' if kept else 'Try again'}")
    ended(page)
    expect(page.locator(".exchange")).to_have_count(1)


def test_the_limit_of_tokens_is_named(open_page):
    """Oracle: finish_reason."""
    page = open_page()
    say(page, "a long answer")
    assert texts(page, ".ending") == ["The answer ends here because it reached the most tokens."]


def test_an_api_key_is_asked_for_and_kept_only_if_asked(open_page, script):
    """Oracle: the key that the server has; the browser's store."""
    script.key = "secret"
    page = open_page()
    say(page, CITY)
    expect(page.locator(".failure")).to_contain_text("The server asks for an API key.")
    page.click(".failure button")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "wrong")
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_contain_text("The server refuses this API key.")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_text(page_server.MODEL)
    page.click("text=Try again")
    ended(page)
    assert texts(page, ".model-turn .text") == [page_server.ANSWERS["new city"][0]]
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0
    page.check("#keep-key")
    assert page.evaluate("sessionStorage.getItem('api-key')") == "secret"
    page.reload()
    expect(page.locator("#model")).to_have_text(page_server.MODEL)
    page.uncheck("#keep-key")
    assert page.evaluate("sessionStorage.length") == 0


def test_settings_are_sent(open_page, script):
    """Oracle: the request; words beside a setting that is not a valid number."""
    page = open_page()
    for name, value in {"temperature": "0,5", "top_p": "", "max_tokens": "20", "seed": "7"}.items():
        page.fill(f"#{name}", value)
    page.fill("#situation", "")
    say(page, CITY)
    (body,) = bodies(script, GUARD)
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 20, 7)
    assert "top_p" not in body
    assert (body["messages"], body["instruction"]) == ([user(CITY)], chat.ROLE)
    page.fill("#temperature", "nan")
    page.fill("#message", "kept")
    page.press("#message", "Enter")
    expect(page.locator("#temperature-problem")).to_have_text(
        "Temperature must be a number from 0 to 2."
    )
    expect(page.locator("#temperature")).to_be_focused()
    expect(page.locator("#below-text")).to_contain_text("Nothing was sent")
    expect(page.locator("#message")).to_have_value("kept")
    assert len(script.requests) == 1


def test_texts_are_never_markup(open_page, script):
    """Oracle: no element is made of an answer, a rule of thumb, a label or a turn."""
    attack = "<img src=x onerror=\"document.title='hit'\">"
    script.answer = f"{attack} <script>document.title='hit'</script>"
    script.verdict = {
        **page_server.verdict(""), "label": attack, "rots": [attack], "needs_human": True,
        "probabilities": {attack: 1},
    }  # fmt: skip
    page = open_page()
    guard(page, "off")
    say(page, attack)
    assert texts(page, ".user .text") == [attack]
    assert texts(page, ".model-turn .text") == [script.answer]
    assert texts(page, ".chip:visible") == [attack, attack]
    assert texts(page, ".rots li") == [attack, attack]
    assert page.locator("#turns img, #turns script").count() == 0
    assert page.title() == "Cosmo"


def test_the_policy_refuses_markup_and_other_servers(browser, server):
    """Oracle: violations that Chromium reports for innerHTML, inline handlers and other origins."""
    page = browser.new_page()
    page.goto(server[1])
    violated = page.evaluate(
        """async () => {
          const found = [];
          document.addEventListener("securitypolicyviolation",
            (event) => found.push(event.effectiveDirective));
          const make = (tag) => document.createElement(tag);
          try { document.body.innerHTML = "<p>x</p>"; } catch {}
          const style = make("style"); style.textContent = "p {}"; document.head.append(style);
          fetch("https://example.org/").catch(() => {});
          const image = make("img"); image.src = "https://example.org/x.png";
          document.body.append(image);
          await new Promise((done) => setTimeout(done, 100));
          return found;
        }"""
    )
    page.close()
    assert set(violated) == {
        "require-trusted-types-for", "style-src-elem", "connect-src", "img-src",
    }  # fmt: skip
    with urllib.request.urlopen(server[1]) as response:
        headers = response.headers
    assert headers["Content-Security-Policy"] == served_page.POLICY
    assert "unsafe" not in served_page.POLICY
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_defaults_are_those_of_the_terminal(open_page):
    """Oracle: cosmo.chat."""
    page = open_page()
    expect(page.locator("#situation")).to_have_value(chat.SITUATION)
    expect(page.locator("#role")).to_have_value(chat.ROLE)
    decoding = chat.ChatConfig(session=None).decoding
    assert float(page.input_value("#temperature")) == decoding.temperature
    assert float(page.input_value("#top_p")) == decoding.top_p


def test_keyboard_only(open_page, script):
    """Oracle: every stop of the Tab key shows that it has the focus; a dialogue without a mouse."""
    page = open_page()
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")  # before all else
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = []
    for _ in range(40):
        shown = page.evaluate("""() => {
          const node = document.activeElement;
          if (node === document.body) return null;
          const around = [node, node.closest("label, .box")].filter(Boolean);
          const outlined = around.some((each) => getComputedStyle(each).outlineStyle !== "none");
          return [node.id || node.value || node.textContent.trim(), outlined];
        }""")
        if shown is None or shown[0] in [name for name, _ in seen]:
            break
        seen.append(shown)
        page.keyboard.press("Tab")
    assert [name for name, outlined in seen if not outlined] == []
    names = {name for name, _ in seen}
    assert {"on", "reset", "theme", "situation", "role", "temperature", "key", "copy"} <= names
    assert {"log", "message", "send"} <= names
    page.evaluate("document.querySelector('.skip').focus()")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    assert bodies(script, GUARD)[0]["messages"][-1] == user("one\ntwo")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.press("ArrowUp")  # takes the last turn back
    expect(page.locator("#message")).to_have_value("one\ntwo")
    expect(page.locator(".exchange")).to_have_count(0)


def test_edit_keeps_a_draft(open_page):
    """Oracle: turn and draft are both in the box."""
    page = open_page()
    say(page, CITY)
    page.fill("#message", "draft")
    page.click("text=Edit your turn")
    expect(page.locator("#message")).to_have_value(f"{CITY}\ndraft")


def test_answer_again_replaces_the_answer(open_page, script):
    """Oracle: the same messages with another seed."""
    page = open_page()
    say(page, CITY)
    page.click("text=Answer again")
    ended(page)
    first, second = bodies(script, GUARD)
    assert first["messages"] == second["messages"] and first["seed"] != second["seed"]
    expect(page.locator(".exchange")).to_have_count(1)


def test_a_server_that_takes_no_seed_gets_none(open_page, script):
    """Oracle: the request; a field that nobody can fill, and no seed below the answer."""
    script.takes_seed = False
    page = open_page()
    expect(page.locator("#seed")).to_be_disabled()
    say(page, CITY)
    (body,) = bodies(script, GUARD)
    assert "seed" not in body
    assert re.match(r"\d+ tokens", page.inner_text(".facts"))


def test_dialogue_is_downloaded_and_copied(open_page):
    """Oracle: the record that `cosmo infer` reads."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.click("#copy")
    expect(page.locator("#saved")).to_have_text("There is nothing to copy yet.")
    say(page, CITY)
    with page.expect_download() as found:
        page.click("#download")
    line = pathlib.Path(found.value.path()).read_text()
    assert found.value.suggested_filename == "dialogue.jsonl"
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "narrative": chat.SITUATION,
        "instruction": chat.ROLE,
        "turns": [CITY, page_server.ANSWERS["new city"][0]],
    }
    page.click("#copy")
    expect(page.locator("#saved")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == line


def test_any_cut_of_the_stream_gives_the_same_text(open_page, script):
    """Oracle: the scripted answer, cut inside characters, lines and CR LF."""
    script.answer, script.bytes_at_a_time = "Zoë, 🎻 — “naïve”… 東京.", 3
    page = open_page()
    say(page, CITY)
    assert texts(page, ".model-turn .text") == [script.answer]


# Texts and what is painted behind them. A background of some transparency is mixed with the next.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], below) => {
    const share = a / 255;
    return [r, g, b].map((value, at) => value * share + below[at] * (1 - share));
  };
  const behind = (node) => {
    if (!node) return [255, 255, 255];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 255 ? colour.slice(0, 3) : over(colour, behind(node.parentElement));
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (front, back) => {
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    if (!node.checkVisibility() || node.closest("script, style, .unseen")) continue;
    const back = behind(node);
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    const field = node.matches("input:not([type=radio], [type=checkbox]), textarea");
    const style = getComputedStyle(node);
    if (own || field) {
      const front = over(parse(style.color), back);
      found.push([ratio(front, back), 4.5, node.className || node.id || node.tagName]);
    }
    if (field && node.placeholder) {
      const front = over(parse(getComputedStyle(node, "::placeholder").color), back);
      found.push([ratio(front, back), 4.5, `${node.id} placeholder`]);
    }
    if (field && style.borderTopStyle !== "none") {  // WCAG 1.4.11: what shows where a field is
      const edge = over(parse(style.borderTopColor), behind(node.parentElement));
      found.push([ratio(edge, behind(node.parentElement)), 3, `${node.id} border`]);
    }
  }
  return found;
}"""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_contrast(colours, open_page, script):
    """Oracle: WCAG 2.2's ratio from computed colours: 4.5 for text, 3 for borders of fields."""
    page = open_page(color_scheme=colours)
    backgrounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, re.findall(r"\d+", backgrounds)[:3])) > 384
    assert bright == (colours == "light")
    found = page.evaluate(CONTRASTS)  # the five labels of the legend
    for text in (BOSS, ALONE, "error 429", "cut"):
        say(page, text)
        found += page.evaluate(CONTRASTS)
    page.fill("#temperature", "x")
    guard(page, "both")
    say(page, "is not sent")
    found += page.evaluate(CONTRASTS)
    page.fill("#temperature", "1")
    page.click("#reset")
    found += page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [each for each in found if each[0] < each[1]] == []


def test_the_switch_of_colours_is_kept(open_page):
    """Oracle: the background, before and after a reload."""
    page = open_page(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    dark = page.evaluate(background)
    assert dark != light
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "true")
    page.reload()
    assert page.evaluate(background) == dark


def test_phone_width_has_no_horizontal_scroll(open_page, script):
    """Oracle: no visible element reaches beyond 360 points, with long words too."""
    script.answer = "x" * 300 + " and more."
    page = open_page(360, 740, has_touch=True)
    wide = """() => [...document.body.querySelectorAll("*")]
      .filter((node) => node.checkVisibility() && !node.closest(".unseen, .skip, h1"))
      .filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5)
      .map((node) => node.className || node.id || node.tagName)"""
    overflow = "document.documentElement.scrollWidth + document.body.scrollWidth"
    guard(page, "both")
    for text in ("y" * 300, BOSS, "error 400"):
        say(page, text)
        assert (page.evaluate(wide), page.evaluate(overflow)) == ([], 720)
    first, second = (turn.bounding_box() for turn in page.locator(".pair .turn").all()[:2])
    assert second["y"] >= first["y"] + first["height"]  # one below the other
    expect(page.locator("#panel")).to_be_hidden()
    page.click("#menu")
    expect(page.locator("#situation")).to_be_visible()
    expect(page.locator("#menu")).to_have_attribute("aria-expanded", "true")
    assert (page.evaluate(wide), page.evaluate(overflow)) == ([], 720)
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#menu")).to_be_focused()


def test_reduced_motion_has_no_animation(open_page):
    """Oracle: the animations that Chromium runs while an answer is written."""
    for motion, moving in (("no-preference", 1), ("reduce", 0)):
        page = open_page(reduced_motion=motion)
        page.fill("#message", "never ends")
        page.press("#message", "Enter")
        expect(page.locator(".model-turn .text")).to_contain_text("I am glad")
        assert page.evaluate("document.getAnimations().length") == moving


def until(page, condition: str) -> None:
    """Wait for an expression of JavaScript to be true; `wait_for_function` is against the CSP."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def test_the_end_stays_in_view_unless_the_user_scrolls_up(open_page, script):
    """Oracle: the scroll position."""
    page = open_page(1000, 500)
    below = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.all.log)"
    for _ in range(3):
        say(page, BOSS)
    until(page, f"{below} < 2")
    script.held = True
    page.fill("#message", BOSS)
    page.press("#message", "Enter")
    expect(page.locator(".model-turn .text").last).to_contain_text("I under")
    page.hover("#log")
    page.mouse.wheel(0, -5000)
    # A wheel scrolls at a frame of the browser's, so the answer waits for it.
    until(page, "document.all.log.scrollTop == 0")
    script.held = False
    ended(page)
    assert page.evaluate("document.all.log.scrollTop") == 0


def test_fields_have_names(open_page):
    """Oracle: the accessible names that Chromium computes."""
    page = open_page()
    for name in ("Situation", "Role of the model", "Temperature", "Top-p", "Seed", "API key"):
        expect(page.get_by_label(name, exact=True)).to_have_count(1)
    for role, name in (("textbox", "Message"), ("group", "Guard"), ("region", "Dialogue")):
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    expect(page.get_by_role("button", name="New dialogue")).to_have_count(1)


def test_the_servers_own_routes(browser):
    """Oracle: the scripted scheduler's text and the scripted labeller's label, over `cosmo serve`'s
    routes. Canary's own entry among the models is no choice.
    """
    scheduler = serve_parts.ScriptedScheduler("Please do not scare them.")
    with test_serve_api.served(scheduler, labeller=test_serve_api.ScriptedLabeller()) as made:
        client, service = made
        page = browser.new_page()
        page.goto(str(client.base_url))
        expect(page.locator("#model")).to_have_text("scripted")
        guard(page, "off")
        say(page, "I want to scare my kids.")
        assert texts(page, ".model-turn .text") == ["Please do not scare them."]
        assert texts(page, ".chip:visible") == ["Needs caution"] * 2
        assert texts(page, ".user .rots li") == ["It is wrong to scare people."]
        assert re.search(r"seed \d+ · \d+ tokens", page.inner_text(".facts"))
        asked = service.model.session.vocabulary.decode(list(scheduler.seen[0][0]))
        assert asked.startswith(chat.SITUATION) and chat.ROLE in asked
        page.close()


def test_pictures_of_the_docs(browser, server, script, tmp_path):
    """Oracle: three PNGs; those in docs/images have at most 150 kB."""
    files = page_screenshots.take(browser, server[1], tmp_path)
    assert [file.stem for file in files] == list(page_screenshots.PICTURES)
    for file in files:
        shown = ROOT / "docs" / "images" / file.name
        assert file.read_bytes()[:4] == shown.read_bytes()[:4] == b"\x89PNG"
        assert shown.stat().st_size <= 150_000


def test_without_chromium_the_command_names_what_is_missing(monkeypatch):
    """Oracle: the names that were looked for."""
    monkeypatch.setattr(page_screenshots.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no Chromium: none of chromium"):
        page_screenshots.launch(None)
