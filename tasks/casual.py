"""Make Canary's examples of casual dialogue corpora: every utterance is labelled casual.

Kim et al. 2022, section 4.1 and appendix E: DailyDialog, EmpatheticDialogues and BlendedSkillTalk
serve as dialogues about which nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

from cosmo.tasks.conversations import Conversation
from cosmo.tasks.formatting import Example
from cosmo.tasks.safety import LabelStyle, label_text


def casual_examples(dialogue: Conversation, style: LabelStyle = "text") -> Iterator[Example]:
    """Yield an example per utterance: the dialogue up to it, and the label "casual".

    Ids are the dialogue's and the number of utterances before the last. Personas and topics are
    left out.
    """
    response = label_text("__casual__", style)
    # Every turn ends an example, as in ParlAI's teachers of these corpora. Both speakers are
    # judged, because in these corpora nobody plays the problematic part.
    for last in range(len(dialogue.turns)):
        turns = dialogue.turns[: last + 1]
        yield Example(f"{dialogue.id}-{last}", "", "", turns, response)
