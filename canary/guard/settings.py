"""The settings of a guard, and what they open: policy, audit log, the ways to a person."""

import dataclasses
import logging
from typing import Any

from canary.guard import audit, people
from canary.guard.policy import Policy, check_webhook, load

log = logging.getLogger("canary.guard")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Settings of a guard: a URL (`webhook`), a switch (`audit_text`), paths. None leaves one out.

    `policy` is a TOML file of the keys that differ from the default. `audit` gets each decision,
    with `audit_text` also the texts. `queue` gets each intervention, and `webhook`, if given,
    is called for it in place of the policy's.
    """

    policy: str | None = None
    audit: str | None = None
    audit_text: bool = False
    queue: str | None = None
    webhook: str | None = None

    def rules(self) -> Policy:
        """Return the policy. Raises UserError."""
        rules = load(self.policy)
        if self.webhook is None:
            return rules
        check_webhook(self.webhook, "--webhook")
        intervention = dataclasses.replace(rules.intervention, webhook=self.webhook)
        return dataclasses.replace(rules, intervention=intervention)

    def parts(self, rules: Policy) -> dict[str, Any]:
        """Open the audit log and the queue; return the arguments of `routes.Guard` that they are.

        Raises UserError.
        """
        if not (self.queue or rules.intervention.webhook):
            log.warning("no --queue and no webhook: only answers and --audit show interventions")
        return {
            "log_file": audit.LineLog(self.audit) if self.audit else audit.NoLog(),
            "people": people.People(rules.intervention, self.queue),
            "audit_text": self.audit_text,
        }
