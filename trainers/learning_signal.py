"""Warn of a run that goes nowhere: rollouts without a signal, and a policy that collapses."""

import logging
from collections import deque
from statistics import mean

NUM_ROLLOUTS = 5  # in a row, before a warning
NUM_ENTROPIES = 5  # in a mean: one step's entropy may be half of another's by chance

logger = logging.getLogger(__name__)


class SignalWatch:
    """A watch that warns once when several rollouts in a row carry no signal."""

    def __init__(self):
        self._recent = deque(maxlen=NUM_ROLLOUTS)
        self._has_warned = False

    def note(self, outcomes: list[bool] | list[float], group_size: int | None) -> None:
        """
        Record a rollout.

        Args:
            outcomes (`list[bool]` or `list[float]`):
                For each completion, whether it passes, or its reward if that is not known. Rewards say less: with a
                length penalty they differ among completions that all fail, too.
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


def collapse(log_history: list[dict]) -> dict[str, str]:
    """
    Look for a collapse in a run's log. The training pass rate may look normal while it happens.

    Args:
        log_history (`list[dict]`):
            The trainer's log, `trainer.state.log_history`.

    Returns:
        `dict[str, str]`: By metric, what has happened and what to do: `eval_pass_rate` if its latest value is below two
        thirds of the run's best, `entropy` if the mean of the latest five values is below half of that of the run's
        first five. Entropy falls in runs that learn well, too.
    """
    warnings = {}
    pass_rates = _values(log_history, "eval_pass_rate")
    if pass_rates and pass_rates[-1] < 2 / 3 * max(pass_rates):
        warnings["eval_pass_rate"] = (
            f"the policy may be collapsing: the validation pass rate fell from {max(pass_rates):.1%} to "
            f"{pass_rates[-1]:.1%}. Lower learning_rate, set beta above 0, or stop earlier; load_best_model_at_end "
            "with metric_for_best_model: eval_pass_rate keeps the best checkpoint"
        )
    entropies = _values(log_history, "entropy")
    first, latest = entropies[:NUM_ENTROPIES], entropies[-NUM_ENTROPIES:]
    if len(entropies) >= 2 * NUM_ENTROPIES and mean(latest) < mean(first) / 2:
        warnings["entropy"] = (
            f"the policy's entropy fell from {mean(first):.3g} to {mean(latest):.3g} (means of {NUM_ENTROPIES}): it "
            "has become surer of its programs, or it may be collapsing. The validation pass rate tells which "
            "(eval_strategy: steps). If it falls, lower learning_rate, set beta above 0, or stop earlier"
        )
    return warnings


def _values(log_history: list[dict], name: str) -> list[float]:
    """Return a metric's values. TRL logs the mean of nothing as None."""
    return [entry[name] for entry in log_history if entry.get(name) is not None]
