"""Take the answer out of a model's text: no reasoning, no tokens of a template, no fences.

Models and servers spell these marks in many ways (`<think>`, `[THINK]`, harmony's channels). One
scanner finds every mark, a table gives its meaning, and the text between marks is sorted by it.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from pathlib import Path

# Outputs made by another version are made anew from the journal, so that one corpus has one rule.
# Raise it with every change of what an answer is.
VERSION = 1
# Faults of an answer: why it has no text that can be used. They are reasons of rejections.
USED_UP = "reasoning used up max_tokens"
ALONE = "reasoning without an answer"
MIXED = "reasoning and answer cannot be told apart"

_WORDS = tomllib.loads(Path(__file__).with_name("answer_marks.toml").read_text(encoding="utf-8"))
_REASONING, _WRAPPERS, _ENDS, _HEADERS, _HEADER_ENDS, _ANSWERERS, _OTHERS, _PLAIN = (
    frozenset(_WORDS[name].split())
    for name in (
        *("reasoning", "wrappers", "ends", "headers", "header_ends"),
        *("answerers", "others", "plain"),
    )
)
# Reserve pieces of T5, Gemma and Llama 3, and SentencePiece's bytes (<0x0A>).
_NUMBERED = re.compile(r"(?:extra_id_|unused|reserved_special_token_)\d+|0x[0-9a-f]{2}")
# One mark: <...> in any of its brackets, [...] in capitals, <<SYS>>.
_MARK = re.compile(
    r"(?:<<|<|\uff1c|&lt;|\u25c1)(?P<angle>[^<>\n\uff1c\uff1e\u25c1\u25b7]{1,80}?)"
    r"(?:>>|>|\uff1e|&gt;|\u25b7)"
    r"|\[(?P<square>/?(?:THINK|INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|BOS|EOS|PAD|UNK|CLS"
    r"|SEP|MASK|ASSISTANT|USER|SYSTEM))\]"
)
_PAIR = re.compile(
    r"[\[({](think|thinking|reasoning|thought|thoughts)[\])}](?=.*[\[({]/\1[\])}])", re.I | re.S
)
_PAIR_END = re.compile(r"[\[({](/(?:think|thinking|reasoning|thought|thoughts))[\])}]", re.I)
_NAME = re.compile(r"(?P<slash>\\?/\s*)?(?:[\w.-]+:)?(?P<name>[\w-]+)")
_ROLE = re.compile(r"[ \t]*(?P<role>[A-Za-z_]+)(?P<rest>[^\n<]*)\n?")
_FENCED_REASONING = re.compile(
    r"^[ \t]*```[ \t]*(?:think|thinking|thought|thoughts|reasoning|analysis|scratchpad)[ \t]*\n"
    r"(?P<inside>.*?)(?P<end>^[ \t]*```[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+#.-]*[ \t]*$\n?", re.MULTILINE)
_FENCE = re.compile("`{3,}")
_CUT_MARK = re.compile(r"<[|/][\w|]{0,20}$")  # the token limit cut it
# Harmony's channels, where the server took their tokens away: "analysisThe user ...assistantfinal".
_BARE_CHANNEL = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?=[A-Z\"'(\u201c])")
_BARE_FINAL = re.compile("assistantfinal")
# "Reasoning: ... Answer: ...", as labels or headings.
_LABELLED = re.compile(
    r"\s*(?:[#*]{1,4}\s*)?(?:my )?(?:thinking|reasoning|thought process|thoughts?|analysis)"
    r"(?:[*]{0,2}:|:?[*]{2})|\s*(?:[#]{1,4}|[*]{2})\s*(?:thinking|reasoning|"
    r"thought process|thoughts?|analysis)[*:]*[ \t]*\n|Thinking\.\.\.\n(?=.*done thinking)",
    re.IGNORECASE | re.DOTALL,
)
_LABELLED_ANSWER = re.compile(
    r"^[#* \t]*(?:(?:final |my )?(?:answer|response|output|story|narrative|version)|conversation|"
    r"dialogue|rewritten story)[*: \t]*(?:(?<=[:*])|\n)|^\W*done thinking\.?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_HTML = re.compile(r"<!--.*?-->|</?(?:p|b|i|u|em|strong|div|span)(?:\s[^<>\n]*)?>", re.I | re.S)
_HTML_BREAK = re.compile(r"<br\s*/?>\n?", re.IGNORECASE)
# Llama's header, where the server took its tokens away.
_BARE_ROLE = re.compile(r"\s*(?:assistant|model)[ \t]*\n")
_BARE_TURN = re.compile(r"(?<=[.!?\"'\u201d\u2026*)])(?:assistant|user|model)[ \t]*\n")
# Alpaca's and Vicuna's headers.
_HEADING = re.compile(
    r"^#{2,3} ?(?:Instruction|Human|User|Input|Assistant|Response):[ \t]*\n?"
    r"|(?<=\n\n)(?:Human|User|USER):(?=\s)",
    re.MULTILINE,
)
# Reasoning as plain text: it names the user, or the task, as no story does.
_PLAIN_REASONING = re.compile(
    r"\W*(?:(?:okay|ok|alright|hmm|so|first|well)[,.!]*\s+){0,2}"
    r"(?:the user(?:'s)? (?:wants?|asks?|is asking|asked|has asked|has given|provided|gave|request)"
    r"|(?:we|i) (?:need|have|should|are asked|am asked)(?: to)? (?:write|rewrite|produce|generate|"
    r"output|continue|respond with|answer with) [^.\n]{0,40}"
    r"(?:story|narrative|conversation|dialogue|sentences?|turns|text|response|answer)\b"
    r"|(?:thinking|thought|reasoning) process\W*[:\n]|chain of thought\W*[:\n])",
    re.IGNORECASE,
)
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")  # colours of a terminal
_BREAKS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_CLOSING_TAG = re.compile(r"</[A-Za-z][\w:-]*\s*>")
# Most answers have none of these characters, and one search is faster than all the patterns.
_HINTS = re.compile("[<\\[`~#\uff1c\u25c1&]|[({]/")


def separated(text: str, finish_reason: str = "stop") -> tuple[str, str, bool]:
    """Return (answer, fault, whether reasoning was taken off). With a fault the answer is empty."""
    text = _without_controls(text)
    text, reasoned = _FENCED_REASONING.sub(_as_tags, text), False
    if _HINTS.search(text):
        text, reasoned, fault = _sorted(text)
        if fault:
            # The token limit cut the reasoning: the remedy is more tokens, not another try.
            return "", USED_UP if finish_reason == "length" and fault == ALONE else fault, True
    cut = USED_UP if finish_reason == "length" else MIXED
    # The last mark counts, because the reasoning before it may contain the word too.
    *_, last = (None, *_BARE_FINAL.finditer(text))
    if last:
        text, reasoned = text[last.end() :], True
    elif _BARE_CHANNEL.match(text):
        return "", cut, True
    if _LABELLED.match(text):
        found = _LABELLED_ANSWER.search(text)
        if not found:
            return "", cut, True
        text, reasoned = text[found.end() :], True
    if headed := _BARE_ROLE.match(text):
        text = text[headed.end() :].lstrip("\n")
    if turned := _BARE_TURN.search(text):
        text = text[: turned.start()]
    text = _first_section(text)
    if _HINTS.search(text):
        text = _FENCE.sub("", _FENCE_LINE.sub("", text)).strip("\n")
        text = _HTML.sub("", _HTML_BREAK.sub("\n", _CUT_MARK.sub("", text)))
    if _PLAIN_REASONING.match(text):
        # No mark shows where it ends.
        return "", cut, True
    # One spelling of each accented letter, so that the stages can compare texts.
    return unicodedata.normalize("NFC", text), "", reasoned


def mark_in(text: str) -> str:
    """Return the first mark of reasoning, template, fence or control in a text, or ""."""
    if found := _CONTROL.search(text):
        return f"U+{ord(found[0]):04X}"
    if not _HINTS.search(text):
        return ""
    for mark in _MARK.finditer(text):
        if _meaning(mark)[0]:
            return mark[0]
    found = _PAIR_END.search(text) or _CLOSING_TAG.search(text) or re.search("`{3}", text)
    return found[0] if found else ""


def _without_controls(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL.sub("", _BREAKS.sub("\n", text))


def _as_tags(fenced: re.Match[str]) -> str:
    return f"<think>{fenced['inside']}" + "</think>" * bool(fenced["end"])


def _first_section(text: str) -> str:
    """Return the text before the heading of another section, or after a heading at its start."""
    while (heading := _HEADING.search(text)) and not text[: heading.start()].strip():
        text = text[heading.end() :]
    return text[: heading.start()] if heading else text


def _meaning(mark: re.Match[str]) -> tuple[str, str]:
    """Return (meaning, name) of a mark.

    Meanings: open and close (of reasoning), wrapper and unwrap (of the answer), header, message,
    role, end, noise. "" if it is no mark ("<3", "<laughs>").
    """
    inner = mark["square"] or mark["angle"]
    bare = inner.strip().lower().replace("\uff5c", "|").replace("\u2581", "_")
    barred = bare.startswith("|") or bare.endswith("|")
    if barred and bare.startswith("|") != bare.endswith("|"):
        # One bar, as <|channel>thought and <channel|>: the side shows whether it opens.
        name = bare.strip("| ")
        if name in ("channel", "turn"):
            return ("header" if bare.startswith("|") else "close_header"), name
    bare = bare.strip("| ")
    found = _NAME.match(bare)
    if not found:
        return "", ""
    name, closes = found["name"].replace("-", "_"), bool(found["slash"])
    if bare == "unused95":  # MedGemma
        return "close", name
    if bare.endswith("/") and name in _REASONING:
        return "noise", name  # <think/> holds nothing
    core = name
    for prefix in ("begin_of_", "start_of_", "begin_", "start_", "end_of_", "end_"):
        if name.startswith(prefix) and name.removeprefix(prefix) in _REASONING | _WRAPPERS:
            core, closes = name.removeprefix(prefix), closes or prefix.startswith("end")
            break
    whole = found.end() == len(bare) or bare[found.end()] in " \t="
    if core in _REASONING and whole and not (barred and core in ("final", "commentary")):
        return ("close" if closes else "open"), name
    if mark["square"]:
        if name in ("inst", "system_prompt", "available_tools", "tool_calls"):
            return ("answerer" if closes else "role"), name
        if name in _ANSWERERS or name in _OTHERS:
            return ("answerer" if name in _ANSWERERS else "role"), name
        return ("end" if name == "eos" else "noise"), name
    token = ("/" if closes else "") + name
    if barred:
        if name in _HEADERS:
            return "header", name
        if name in _HEADER_ENDS:
            return "message", name
        if name in _ENDS or name.startswith("end_of_"):
            return "end", name
        if name in _ANSWERERS:
            return "answerer", name
        if core in _WRAPPERS:
            return ("unwrap" if closes else "wrapper"), name
        return ("role" if name in _OTHERS else "noise"), name
    if token in ("/s", "eos", "end_of_turn"):
        return "end", name
    if name == "start_of_turn":
        return "header", name
    if name == "sys" and mark[0].startswith("<<"):
        return ("answerer" if closes else "role"), name
    if name in ("tool_call", "tool_calls", "tool_response", "function_call"):
        return ("answerer" if closes else "role"), name
    if token in _PLAIN or _NUMBERED.fullmatch(name):
        return "noise", name
    if core in _WRAPPERS and bare.strip("/ ") == name:
        return ("unwrap" if closes else "wrapper"), name
    return "", ""


def _sorted(text: str) -> tuple[str, bool, str]:
    """Return the answer between the marks, whether there was reasoning, and a fault or ""."""
    if _PAIR_END.search(text):  # "[thinking]" alone is a direction, a pair is reasoning
        text = _PAIR_END.sub(r"<\1>", _PAIR.sub(r"<\1>", text))
    kept: list[str] = []
    section, reasoned, marked, place = "answer", False, False, 0
    header = 0  # pieces before the last header
    tagged = False  # whether the reasoning began with a tag, and not with a channel
    for mark in _MARK.finditer(text):
        meaning, name = _meaning(mark)
        if not meaning or mark.start() < place:
            continue
        if section == "answer":
            kept.append(text[place : mark.start()])
        place, marked = mark.end(), True
        if meaning == "open":
            if section == "answer":
                section, reasoned, tagged = "reasoning", True, True
        elif meaning == "close":
            if section != "reasoning":
                kept = []  # the opening tag stood in the prompt: all before was reasoning
            section, reasoned = "answer", True
        elif meaning in ("header", "role", "answerer"):
            role, place = (name, place) if meaning != "header" else _role(text, place)
            if "".join(kept).strip():
                if meaning == "role" or role in _OTHERS:
                    section = "done"  # the model continues as its user
                    break
                if name != "channel" or role not in _ANSWERERS:
                    return "", reasoned, MIXED
            if meaning == "answerer" or role in _ANSWERERS or (not role and name != "channel"):
                section = "answer"
            elif role in _REASONING:
                section, reasoned, tagged = "reasoning", True, False
            else:
                section = "other"
            header = len(kept)
        elif meaning == "message":
            del kept[header:]  # the rest of the header, as a format
        elif meaning == "close_header":
            section = "answer"
        elif meaning == "wrapper":
            kept = [] if section != "reasoning" else kept
        elif meaning in ("unwrap", "end"):
            if section == "answer" and "".join(kept).strip():
                section = "done"
                break
            if section == "reasoning" and meaning == "end":
                if tagged:
                    break
                section = "other"
    if section == "answer":
        kept.append(text[place:])
    answer = "".join(kept)
    if section == "reasoning":
        return "", True, MIXED if answer.strip() else ALONE
    if reasoned and not answer.strip():
        return "", True, ALONE
    return (answer.strip("\r\n") if marked else answer), reasoned, ""


def _role(text: str, place: int) -> tuple[str, int]:
    """Return the role or channel that a header names, and the place after it."""
    found = _ROLE.match(text, place)
    if not found:
        return "", place
    role = found["role"].lower()
    known = _ANSWERERS | _OTHERS | _REASONING
    if role not in known:  # "finalThe story" has no mark between
        return "", place
    return role, found.end() if found["rest"].strip()[:3] in ("", "to=") else found.end("role")
