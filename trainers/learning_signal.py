"""Warn of a run that has nothing to learn from: outcomes that are compared with each other must differ."""

import logging
from collections import deque

NUM_ROLLOUTS = 5  # in a row, before a warning

logger = logging.getLogger(__name__)


class SignalWatch:
    """Warn once when several rollouts in a row carry no signal."""

    def __init__(self):
        self._recent = deque(maxlen=NUM_ROLLOUTS)
        self._has_warned = False

    def note(self, outcomes: list[bool] | list[float], group_size: int | None) -> None:
        """
        Record a rollout.

        Args:
            outcomes (`list[bool]` or `list[float]`):
                Of each completion whether it passes, or its reward where that is not known. Not its reward if passes
                are known: with a length penalty the rewards of completions that all fail differ as well.
            group_size (`int` or `None`):
                How many neighbours are compared with each other; `None` if no baseline is subtracted, so that all
                completions of all rollouts are.
        """
        self._recent.append(outcomes)
        if group_size is None:
            groups = [[outcome for rollout in self._recent for outcome in rollout]]
        else:
            groups = [
                rollout[i : i + group_size] for rollout in self._recent for i in range(0, len(rollout), group_size)
            ]
        has_signal = any(max(group) - min(group) > 1e-8 for group in groups)
        if has_signal or self._has_warned or len(self._recent) < NUM_ROLLOUTS:
            return
        self._has_warned = True
        seen = {outcome for group in groups for outcome in group}
        if not all(isinstance(outcome, bool) for outcome in seen):
            what = "all rewards that are compared with each other are the same"
        elif seen == {False}:
            what = "no completion has passed; with a length penalty the policy learns to write less, not to pass"
        elif seen == {True}:
            what = "every completion has passed, only their lengths can still improve"
        else:
            what = "of the completions that are compared with each other all pass or none does"
        logger.warning(
            f"{NUM_ROLLOUTS} rollouts in a row carry no signal: {what}. Tasks of another difficulty, more completions "
            "(num_generations) or a higher temperature give rewards that differ"
        )
