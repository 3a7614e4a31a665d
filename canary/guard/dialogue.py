"""Read a request of OpenAI's API as the dialogues that Canary judges, and add guidance to it.

The rules, which docs/guard.md gives to users:

- A run of user messages is one turn, and so is a run of assistant messages. The model answers the
  whole run, so a bad line cannot hide before a harmless one.
- The dialogue ends with the latest user turn. An answer that the client began, its reasoning, and
  results of tools after that turn are judged as further turns. The most severe label counts.
- System and developer messages are the operator's. They are no turns; by policy each is judged as
  a dialogue of its own.
- The fields of `cosmo serve` that the model reads (EXTRA) are judged as a dialogue of their own.
- Results of tools and reasoning before the latest user turn, calls of tools, and names are left
  out.
- Text parts of a content are joined by line breaks. Other parts cannot be read: by policy the
  request is refused.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from canary import prompts
from canary.guard.policy import Policy
from canary.guard.sentences import whole
from cosmo.engine.base.errors import shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Fields of a message that are read, or that hold no text which the model answers.
FIELDS = {
    "role", "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call",
    "reasoning_content", "reasoning", "prefix", "cache_control",
}  # fmt: skip
MAX_MESSAGES = 10_000  # to read them takes a tenth of a second
# Fields of a request, outside its messages, that `cosmo serve` puts into the model's input.
EXTRA = ("narrative", "instruction", "rots")
REASONING = ("reasoning_content", "reasoning")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CALL_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
TEXT_PARTS = ("text", "input_text", "output_text")
# Fields of a part, beside its text, that the model does not read.
PART_FIELDS = {"type", "cache_control", "annotations", "logprobs"}
# Characters that T5's vocabulary reads as a space beside white space, and those that it leaves out.
_SPACES = r"\s\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd"
_LEFT_OUT = r"\x00-\x08\x0e-\x1b\x7f\x8f\x9f"
# Slashes that begin a word: Canary reads " // " as the end of a turn, and a turn must not forge it.
# The vocabulary reads a full-width slash as a slash.
_FORGED = re.compile(rf"[/\uff0f](?<![^{_SPACES}{_LEFT_OUT}][/\uff0f])(?:[{_LEFT_OUT}]*[/\uff0f])+")
_SPACE = re.compile(r"\s+")


class RefusedError(Exception):
    """A request that the guard refuses: the reason, and the name of the parameter."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


@dataclasses.dataclass(frozen=True)
class Judged:
    """The dialogues of one request, and the turns up to the latest user turn.

    Each of `dialogues` ends with what is judged. `begun` is the answer that the client began.
    """

    turns: tuple[str, ...]
    dialogues: tuple[tuple[str, ...], ...]
    begun: str = ""


def read_chat(body: dict[str, Any], policy: Policy) -> Judged:
    """Return the dialogues of a chat request. Raises RefusedError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages: expected a list of at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        got = f"messages: got {len(messages):,}, expected at most {MAX_MESSAGES:,}"
        raise RefusedError(got, "messages")
    turns: list[tuple[str, list[str]]] = []  # (role, texts) of each run
    system: list[str] = []
    results: list[str] = []  # of tools, since the latest user turn
    reasoning: list[str] = []  # of the assistant, since then
    for place, message in enumerate(messages):
        param = f"messages[{place}]"
        role, text, thought = _message(message, param, policy)
        reasoning += [thought] if thought else []
        if role in ("system", "developer"):
            system += [text] if text else []
        elif role in ("tool", "function"):
            results += [text] if text else []
        elif text:
            if role == "user":
                results, reasoning = [], []
            if turns and turns[-1][0] == role:
                turns[-1][1].append(text)
            else:
                turns.append((role, [text]))
    joined = [(role, "\n".join(texts)) for role, texts in turns]
    last_user = max((n for n, (role, _) in enumerate(joined) if role == "user"), default=-1)
    texts = tuple(text for _, text in joined)
    dialogue = texts[: last_user + 1]
    dialogues = [dialogue] if dialogue else []
    if reasoning:
        dialogues.append((*dialogue, "\n".join(reasoning)))
    begun = ""
    if joined and joined[-1][0] == "assistant":
        # Also before a system message or a tool's result: the model reads it all the same.
        dialogues.append(texts)
        # At the very end it is the beginning of the answer, written by the client.
        begun = texts[-1] if messages[-1]["role"] == "assistant" else ""
    if results and policy.dialogue.tool_messages == "label":
        dialogues.append((*texts, "\n".join(results)))
    if policy.dialogue.system_messages == "label":
        dialogues += [(text,) for text in system]
    dialogues += _extra(body, policy)
    if not dialogues:
        raise RefusedError("messages: no message has a text to judge", "messages")
    return Judged(dialogue or texts, tuple(dialogues), begun)


def _extra(body: dict[str, Any], policy: Policy) -> list[tuple[str, ...]]:
    """Return the dialogue of the fields EXTRA, none where they are empty. Raises RefusedError."""
    if policy.dialogue.extra_fields == "skip":
        return []
    texts: list[str] = []
    for name in EXTRA:
        value = body.get(name)
        found = value if name == "rots" and isinstance(value, list) else [value]
        found = [] if value is None else found
        if all(isinstance(one, str) for one in found):
            texts += map(whole, found)
        elif policy.dialogue.unreadable == "refuse":
            expected = "a list of texts" if name == "rots" else "a text"
            raise RefusedError(
                f"{name} = {shown(value)}: expected {expected}, which the guard can read",
                name,
                "unreadable",
            )
    text = _joined(texts)
    return [(text,)] if text else []


def _message(message: Any, param: str, policy: Policy) -> tuple[str, str, str]:
    """Return (role, text, reasoning) of a message, "" for what is missing. Raises RefusedError."""
    if not isinstance(message, dict):
        raise RefusedError(f"{param}: expected an object with role and content", param)
    role = message.get("role")
    if role not in ROLES:
        raise RefusedError(
            f"{param}.role = {shown(role)}: expected one of {', '.join(ROLES)}", param
        )
    refuse = policy.dialogue.unreadable == "refuse"
    for field, value in message.items():
        if field not in FIELDS and value is not None and refuse:
            raise RefusedError(
                f"{param}.{field}: the guard cannot read this field, and its policy refuses what "
                "it cannot read",
                param,
                "unreadable",
            )
    name = message.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        # A longer one could carry a sentence that is not judged.
        raise RefusedError(
            f"{param}.name = {shown(name)}: expected at most 64 letters, digits, _ . or -", param
        )
    call = message.get("tool_call_id")
    if call is not None and not (isinstance(call, str) and _CALL_ID.fullmatch(call)):
        raise RefusedError(
            f"{param}.tool_call_id = {shown(call)}: expected at most 128 letters, digits, "
            "_ . : or -",
            param,
        )
    texts = _content(message.get("content"), f"{param}.content", refuse)
    thoughts: list[str] = []
    if role == "assistant":
        texts += _content(message.get("refusal"), f"{param}.refusal", refuse)
        for field in REASONING:
            thoughts += _content(message.get(field), f"{param}.{field}", refuse)
    return role, _joined(texts), _joined(thoughts)


def _joined(texts: Sequence[str]) -> str:
    return "\n".join(text for text in texts if text.strip())


def _content(content: Any, param: str, refuse: bool) -> list[str]:
    """Return the texts of a content. Raises RefusedError for parts that cannot be read."""
    if content is None:
        return []
    if isinstance(content, str):
        return [whole(content)]
    if not isinstance(content, list):
        raise RefusedError(f"{param} = {shown(content)}: expected a text or a list of parts", param)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        field = "refusal" if kind == "refusal" else "text"
        known = isinstance(kind, str) and kind in (*TEXT_PARTS, "refusal")
        if known and isinstance(part.get(field), str):
            texts.append(whole(part[field]))
            further = part.keys() - PART_FIELDS - {field}
            unread = [name for name in further if part[name] is not None]
            if refuse and unread:
                raise RefusedError(
                    f"{param}[{place}] has the field {shown(min(unread))}: the guard cannot read "
                    "it, and its policy refuses what it cannot read",
                    param,
                    "unreadable",
                )
        elif refuse:
            raise RefusedError(
                f"{param}[{place}] is of type {shown(kind)}: the guard reads text alone, and its "
                "policy refuses what it cannot read",
                param,
                "unreadable",
            )
    return texts


_SPOKEN = re.compile(r"\s*Speaker ([12]):")


def read_completion(body: dict[str, Any], policy: Policy) -> Judged:
    """Return the dialogue of a completions request. Raises RefusedError.

    A prompt in the paper's form (`prompts.basic`) gives its turns. Any other is one turn.
    """
    turns = completion_turns(body, policy)
    return Judged(turns, (turns, *_extra(body, policy)))


def completion_turns(body: dict[str, Any], policy: Policy) -> tuple[str, ...]:
    """Return the turns of a prompt. Raises RefusedError."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        raise RefusedError("prompt: the guard takes one prompt a request", "prompt")
    if not isinstance(prompt, str):
        # Numbers of tokens are text that only the model's own vocabulary can read.
        raise RefusedError(
            "prompt: expected a text, which the guard can read", "prompt", "unreadable"
        )
    suffix = body.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise RefusedError(f"suffix = {shown(suffix)}: expected a text", "suffix")
    prompt = whole(prompt)
    turns = paper_turns(prompt) if not suffix else None
    turns = turns or (f"{prompt}\n{whole(suffix)}" if suffix else prompt,)
    if not turns[0].strip():
        raise RefusedError("prompt: expected a text that is not empty", "prompt")
    return turns


def paper_turns(prompt: str) -> tuple[str, ...] | None:
    """Return the turns of a prompt that `prompts.basic` wrote, None for any other text."""
    if not prompt.startswith(prompts.OPENING):
        return None
    _, _, spoken = prompt.partition("\n\n")
    parts = _SPOKEN.split(f"\n{spoken.strip()}")
    # ["", number, turn, number, turn, ..., "2", ""]
    turns = tuple(turn.strip() for turn in parts[2:-1:2])
    try:
        # Only where nothing is lost: otherwise text could hide between the turns.
        same = bool(turns) and prompts.basic(turns).strip() == prompt.strip()
    except Exception:
        same = False
    return turns if same else None


def guide(
    form: str, body: dict[str, Any], judged: Judged, rots: Sequence[str], policy: Policy
) -> dict[str, Any]:
    """Return the body with the rules of thumb: in a system message, or in the prompt."""
    rots = clean_rots(rots) or (policy.texts.usual_rot,)
    if form == "completion":
        return {**body, "prompt": prompts.guided(judged.turns, rots)}
    joined = ", ".join(rot.rstrip(".") for rot in rots)
    guidance = policy.texts.system_message.replace("{rots}", joined)
    messages = list(body["messages"])
    first = messages[0]
    before = ""
    # Chat templates of many models take a system message at the beginning alone, and only one.
    if first["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": guidance})
    elif isinstance(first.get("content"), list):
        before = _joined(_content(first["content"], "", refuse=False))
        # A paragraph of its own: servers join parts without a space.
        part = {"type": "text", "text": f"\n\n{guidance}"}
        messages[0] = {**first, "content": [*first["content"], part]}
    else:
        before = first.get("content") or ""
        messages[0] = {**first, "content": f"{before}\n\n{guidance}".strip()}
    # `cosmo serve` reads the first paragraph as the narrative and the rest as the instruction, but
    # takes these fields instead where they are given: the guidance would be lost.
    begins = "instruction" if before.strip() else "narrative"
    replaced = {
        name: f"{body[name]}\n\n{guidance}".strip()
        for name in ("narrative", "instruction")
        if isinstance(body.get(name), str) and (name == begins or "\n\n" in guidance)
    }
    return {**body, "messages": messages, **replaced}


MAX_ROTS, MAX_ROT_CHARS = 8, 300


def clean_rots(rots: Sequence[str]) -> tuple[str, ...]:
    """Return rules of thumb that are safe in a prompt: few, short, each one line.

    Canary writes them, and a user's text may have led it.
    """
    lines = (_SPACE.sub(" ", whole(rot)).strip()[:MAX_ROT_CHARS] for rot in rots)
    return tuple(line for line in lines if line)[:MAX_ROTS]


def readable(turn: str) -> str:
    """Return a turn as Canary reads it: one line, without a forged end of a turn."""
    text = whole(turn)
    return " ".join(_FORGED.sub("/", text).split())


def recent(
    turns: Sequence[str], measure: Callable[[str], int], budget: int, most: int
) -> tuple[str, ...]:
    """Return the newest `most` turns as Canary reads them, without those that cannot fit.

    Canary leaves out the oldest turns, whole, until `budget` tokens are left. To tokenize megabytes
    of them for each label would take seconds. Raises RefusedError for turns with so many characters
    in few tokens that they are no words.
    """
    enough = (budget + 1) * MAX_TOKEN_CHARS
    found: list[str] = []
    chars = 0
    for turn in reversed(turns):
        text = readable(turn)
        if not text:
            continue
        if len(found) >= most:
            break
        # Its end alone does not fit.
        if len(text) > enough and measure(text[-enough:]) > budget:
            break
        chars += len(text)
        if chars > enough:
            if measure(" ".join((text, *reversed(found)))[-enough:]) > budget:
                break
            raise RefusedError(
                f"the dialogue has more than {enough:,} characters in {budget} tokens, which are "
                "no words that Canary reads",
                "messages",
                "text_too_long",
            )
        found.append(text)
    return tuple(reversed(found))


def windows(
    turns: Sequence[str],
    measure: Callable[[str], int],
    budget: int,
    *,
    max_turns: int,
    max_pieces: int,
) -> list[tuple[str, ...]]:
    """Return the dialogues that together show Canary all of the last turn.

    Canary cuts the front of a last turn that is too long, so each piece is a last turn of its own.
    `measure` counts a text's tokens, of which `budget` fit. Raises RefusedError for too many.
    """
    before = recent(turns[:-1], measure, budget, max_turns - 1)
    last = readable(turns[-1])
    found = pieces(last, measure, budget, max_pieces)
    if found is None:
        raise RefusedError(
            f"a text of {len(last):,} characters: expected at most {max_pieces} pieces of {budget} "
            "tokens (the policy's max_pieces)",
            "messages",
            "text_too_long",
        )
    return [(*before, piece) for piece in found]


MAX_TOKEN_CHARS = 64  # no vocabulary known here has longer pieces
OVERLAP_CHARS = 200  # of two pieces: about two sentences


def pieces(text: str, measure: Callable[[str], int], budget: int, most: int) -> list[str] | None:
    """Return a text cut into pieces that fit; None if there would be more than `most`.

    Neighbours overlap, so that words at a cut are read with those around them.
    """
    # By characters first: to measure a text of megabytes takes long.
    if len(text) > most * budget * MAX_TOKEN_CHARS:
        return None
    if len(text) <= budget * MAX_TOKEN_CHARS and measure(text) <= budget:
        return [text]
    found, start = [], 0
    while True:
        size = min(4 * budget, len(text) - start)  # about four characters a token
        while size > 1 and measure(text[start : start + size]) > budget:
            size = size * 3 // 4
        found.append(text[start : start + size])
        if len(found) > most:
            return None
        if start + size >= len(text):
            return [piece for piece in found if piece.strip()]
        start += max(1, size - min(size // 2, OVERLAP_CHARS))


def argument_text(name: str, arguments: str) -> str:
    """Return a tool call as a text: its name, then the keys and values of its arguments."""
    return f"{name} {json_text(arguments)}".strip()


def json_text(arguments: str) -> str:
    r"""Return the texts in JSON, with escapes such as \u0041 undone; other text as it is."""
    try:
        # Pairs, because an object may have a key twice. Numbers as they are written.
        value = json.loads(
            arguments, object_pairs_hook=_Pairs, parse_int=str, parse_float=str, parse_constant=str
        )
    except (ValueError, RecursionError):
        return whole(arguments)
    found, stack = [], [value]
    while stack:
        one = stack.pop()
        if isinstance(one, _Pairs):
            stack += [part for pair in reversed(one) for part in reversed(pair)]
        elif isinstance(one, list):
            stack += reversed(one)
        else:
            found.append(one if isinstance(one, str) else json.dumps(one))
    return whole(" ".join(found))


class _Pairs(list):
    """The pairs of a JSON object."""
