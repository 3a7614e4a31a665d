"""Chat with a model in the terminal, as in Cosmo's public demo: situation, role, then turns."""

import dataclasses
import logging
import time
from collections.abc import Callable

from cosmo import records
from cosmo.engine.infer import infer
from cosmo.engine.model.decoding import DecodingConfig
from cosmo.tasks import formatting

SITUATION = "Cosmo is having a friendly conversation with a friend."
ROLE = "You are Cosmo and you are talking to a friend."
HELP = "[RESET] clears the history, [END] leaves."


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """The model that answers and its decoding; the defaults sample as the demo does."""

    session: infer.SessionConfig
    separators: formatting.Separators = formatting.Separators()
    decoding: DecodingConfig = DecodingConfig(temperature=1.0, top_p=0.95)
    random_seed: int = 0


def talk(config: ChatConfig, situation: str | None = None, role: str | None = None) -> None:
    """Open the model and chat in the terminal."""
    # The smallest batch that the devices allow, in one shape: a user should not wait for XLA.
    shards = config.session.partitioner.mesh().shape["data"]
    session_config = dataclasses.replace(config.session, batch_size=shards, bucketed=False)
    session, _ = session_config.open()
    warm_up(session, config.decoding)
    chat(session, config.separators, config.decoding, config.random_seed, situation, role)


def chat(
    session: infer.Session,
    separators: formatting.Separators,
    decoding: DecodingConfig,
    seed: int = 0,
    situation: str | None = None,
    role: str | None = None,
    # Parameters, so that a test can talk without a terminal.
    read: Callable[[str], str] = input,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Ask for situation and role unless given, then answer line by line. Return the last history.

    As in the demo, `[RESET]` clears the history and keeps situation and role. `[END]` or end of
    file leaves, where the demo asks whether to begin with another situation. Small letters do too.
    """
    turns: list[str] = []
    count = 0
    try:
        here = situation if situation is not None else _ask(read, "Situation", SITUATION)
        who = role if role is not None else _ask(read, "Role", ROLE)
        say(f"situation: {here}\nrole: {who}\n{HELP}\n")
        while (line := read("You: ").strip()).upper() != "[END]":
            if line.upper() == "[RESET]":
                say("(history cleared)\n")
                turns = []
            if not line or line.upper() == "[RESET]":
                continue
            turns.append(line)
            record = {
                # A sample depends on seed and id: the same lines give the same conversation.
                "id": f"{seed}-{count}",
                "narrative": here,
                "instruction": who,
                "turns": turns,
            }
            try:
                row = records.row(record, session.vocabulary, session.lengths["inputs"], separators)
            except ValueError as error:
                # A line that cannot be used costs itself, not the conversation.
                say(f"({error})\n")
                turns.pop()
                continue
            work = infer.generation(session, decoding, seed)
            (answer,) = infer.answer(session, [row], work)
            count += 1
            # Never empty, because the next turn's record may hold no empty turn.
            reply = answer.predictions[0].strip() or "..."
            turns.append(reply)
            say(f"Cosmo: {reply}\n")
    # Ctrl-D, or the end of a script that is piped in.
    except EOFError:
        pass
    return turns


def _ask(read: Callable[[str], str], what: str, default: str) -> str:
    return read(f"{what} [{default}]: ").strip() or default


def warm_up(session: infer.Session, decoding: DecodingConfig) -> None:
    """Compile before the first question, so that the first answer comes as fast as the next."""
    began = time.monotonic()
    row = records.row({"turns": ["Hello."]}, session.vocabulary, session.lengths["inputs"])
    infer.answer(session, [row], infer.generation(session, decoding))
    logging.getLogger("cosmo").info("ready after %.1f s", time.monotonic() - began)
