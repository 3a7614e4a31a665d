"""Make Prost's examples of its seven corpora: who is learnt, and what stands before the response.

Kim et al. 2022 ("ProsocialDialog"), section 4.2 and appendix B.3. The paper trained with ParlAI and
names the corpora alone. Who is learnt and what the history holds are ParlAI's teachers', version
1.7. Each rule below states where this differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cosmo.tasks.conversations import (
    Conversation,
    read_blended,
    read_dailydialog,
    read_empathetic,
    read_persona_chat,
    read_topical_chat,
    read_wizard,
)
from cosmo.tasks.prost_text import ProstExample
from cosmo.tasks.readers import read_prosocial
from cosmo.tasks.safety import needs_rots

# Task of Prost -> its corpus, where its publisher offers it, and the macro of its path.
SOURCES = {
    "prost_prosocial": (
        "ProsocialDialog",
        "https://huggingface.co/datasets/allenai/prosocial-dialog",
        "PROSOCIAL_PATH",
    ),
    "prost_dailydialog": ("DailyDialog", "http://yanran.li/dailydialog", "DAILYDIALOG_PATH"),
    "prost_topical_chat": (
        "Topical-Chat",
        "https://github.com/alexa/Topical-Chat",
        "TOPICAL_CHAT_PATH",
    ),
    "prost_persona_chat": (
        "PersonaChat (ConvAI2)",
        "http://parl.ai/downloads/convai2/convai2_fix_723.tgz",
        "PERSONA_CHAT_PATH",
    ),
    "prost_wizard": (
        "Wizard of Wikipedia",
        "https://parl.ai/projects/wizard_of_wikipedia",
        "WIZARD_PATH",
    ),
    "prost_empathetic": (
        "EmpatheticDialogues",
        "https://github.com/facebookresearch/EmpatheticDialogues",
        "EMPATHETIC_PATH",
    ),
    "prost_blended": ("BlendedSkillTalk", "https://parl.ai/projects/bst", "BLENDED_PATH"),
}


def prosocial_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield an example per response of ProsocialDialog: the guiding speaker's turns alone.

    RoTs are those of a context against social norms. A casual context has none, whatever its row
    has: Kim et al. 2022, section 4.2, and Canary's targets.
    """
    for dialogue in read_prosocial(path, split):
        turns: tuple[str, ...] = ()
        for index, turn in enumerate(dialogue.turns):
            turns += (turn.context,)
            rots = turn.rots if needs_rots(turn.safety_label) else ()
            yield ProstExample(turns, turn.response, rots, f"{dialogue.id}-{index}")
            turns += (turn.response,)


def dailydialog_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield an example per utterance of DailyDialog but the first: both speakers are learnt.

    ParlAI's first speaker answers `__SILENCE__` at the start. This example and the mark are left
    out. The texts keep the spaces before punctuation, as in ParlAI.
    """
    for dialogue in read_dailydialog(path, split, detokenized=False):
        yield from _examples(dialogue, range(1, len(dialogue.turns)))


def topical_chat_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield an example per utterance of Topical-Chat but the first, without the read knowledge.

    ParlAI has no teacher of this corpus and the authors' is not released: both sides are our
    choice.
    """
    for dialogue in read_topical_chat(path, split):
        yield from _examples(dialogue, range(1, len(dialogue.turns)))


def persona_chat_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield an example per utterance of the speaker whose persona is given, the persona first.

    ParlAI writes `__SILENCE__` where this speaker begins. The mark is left out, so that the
    opening's context is the persona alone.
    """
    for dialogue in read_persona_chat(path, split):
        yield from _examples(dialogue, range(dialogue.respondent, len(dialogue.turns), 2))


def wizard_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield an example per utterance of the wizard, the topic first.

    As in ParlAI, a wizard who begins answers the topic alone, and that wizard's last utterance is
    no example.
    """
    for dialogue in read_wizard(path, split):
        responses = range(dialogue.respondent, len(dialogue.turns), 2)
        if dialogue.respondent == 0:
            # ParlAI counts pairs, and those of a beginning wizard reach one pair less far
            # (`add_missing_turns none`, its default). The published numbers of examples are these.
            responses = responses[: (len(dialogue.turns) - 1) // 2]
        yield from _examples(dialogue, responses)


def empathetic_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield EmpatheticDialogues' examples: in training both sides, else the listener's alone.

    As in ParlAI, the history of the speaker's own responses begins with the listener's first one:
    the two sides are dialogues of their own there. The situation is left out.
    """
    for dialogue in read_empathetic(path, split):
        for index in range(1, len(dialogue.turns)):
            listener = index % 2 == 1
            if listener:
                yield from _examples(dialogue, [index])
            elif split == "train":
                yield from _examples(dialogue, [index], first=1)


def blended_examples(path: Any, split: str = "train") -> Iterator[ProstExample]:
    """Yield an example per utterance of BlendedSkillTalk's guided speaker but the opener.

    As in ParlAI, the first text joins persona, topic, both openers and the first message.
    """
    for dialogue in read_blended(path, split):
        opening, rest = dialogue.turns[:3], dialogue.turns[3:]
        joined = "\n".join((*dialogue.context, *opening))
        for index in range(0, len(rest), 2):
            yield ProstExample(
                (joined, *rest[:index]), rest[index], (), f"{dialogue.id}-{index + 3}"
            )


def _examples(
    dialogue: Conversation, responses: Sequence[int], first: int = 0
) -> Iterator[ProstExample]:
    """Yield an example per index of `responses`; its history begins with utterance `first`."""
    for index in responses:
        # Context lines and the first utterance are one text, where the other speaker begins. A
        # respondent who begins is answering the context lines.
        opening = dialogue.turns[first:index][: dialogue.respondent]
        before = "\n".join((*dialogue.context, *opening))
        turns = dialogue.turns[first + len(opening) : index]
        history = (before, *turns) if before else turns
        # Without context lines an opening answers nothing.
        if history:
            yield ProstExample(history, dialogue.turns[index], (), f"{dialogue.id}-{index}")
