"""
Print training's progress on one process: one line a logged step, and a step's completions where `log_completions` asks
for them. The full record stays in the trainer's log.
"""

import time
from collections.abc import Mapping
from itertools import groupby
from textwrap import indent
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

# Logged names and what a line calls them. Of two names with one title the first that was logged is shown.
COLUMNS = {
    "loss": "loss",
    "pass_rate": "pass rate",
    "completion_tokens": "tokens",
    "completions/mean_length": "tokens",
    "reward": "reward",
    "kl": "KL",
    "clip_ratio/region_mean": "clipped",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


def print_progress_lines(trainer: Trainer) -> None:
    """
    Let a trainer print [`ProgressLine`]s in place of its progress bar and its dictionaries of metrics.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLine())


class ProgressLine(TrainerCallback):
    """
    A callback that prints one line per log entry: step, the stage's main metrics, seconds a step, time left.

        step   12/30   pass rate 0.41   tokens 85.3   reward 0.378   22.4 s   7 min left

    Only the main process prints.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self._first_step = self._last_step = state.global_step
        self._started = self._last_time = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or not hasattr(self, "_started"):
            return
        step, now = state.global_step, time.monotonic()
        if "train_runtime" in logs:
            print(f"trained to step {step} in {_duration(now - self._started)}", flush=True)
            return
        is_evaluation = any(name.startswith("eval_") for name in logs)
        parts = [f"step {step:{len(str(state.max_steps))}}/{state.max_steps}"]
        if is_evaluation:
            parts.append("evaluation")
            logs = {name.removeprefix("eval_"): value for name, value in logs.items()}
        shown = {}
        for name, title in COLUMNS.items():
            # The loss of a policy gradient says nothing about progress
            if logs.get(name) is not None and title not in shown and not (name == "loss" and "reward" in logs):
                shown[title] = f"{title} {float(logs[name]):.3g}"
        parts += shown.values()
        if not is_evaluation and step > self._last_step:
            parts.append(f"{(now - self._last_time) / (step - self._last_step):.1f} s")
            left = (state.max_steps - step) * (now - self._started) / (step - self._first_step)
            parts.append(f"{_duration(left)} left")
            self._last_step, self._last_time = step, now
        print("   ".join(parts), flush=True)


def print_completions(logs: Mapping[str, Any], step: int, num_completions: int | None = None) -> None:
    """
    Print a step's completions: each prompt once, and below it its completions with their numbers.

        step 12, prompt 1 of 8: Write a function double(x) that returns twice x.

        unit_tests 0.998   advantage 0.5   verdict passed   completion_tokens 24

            return 2 * x

    Args:
        logs (`Mapping[str, Any]`):
            What TRL's rollout trainers keep of a step: `prompt`, `completion` and `advantages`, one a completion, those
            of one prompt side by side, and `rewards` and `extra`, each a dictionary of such columns.
        step (`int`):
            The optimizer step.
        num_completions (`int`, *optional*):
            How many to print. If `None`, all.
    """
    prompts, completions = list(logs["prompt"]), list(logs["completion"])
    columns = {**logs["rewards"], "advantage": logs["advantages"], **logs["extra"]}
    groups = [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda row: prompts[row])]
    for number, rows in enumerate(groups, start=1):
        if num_completions is not None and rows[0] >= num_completions:
            return
        print(f"\nstep {step}, prompt {number} of {len(groups)}: {_text(prompts[rows[0]])}")
        for row in rows[: None if num_completions is None else num_completions - rows[0]]:
            shown = [
                f"{name} {values[row]:.3g}" if isinstance(values[row], float) else f"{name} {values[row]}"
                for name, values in columns.items()
            ]
            print(f"\n{visible('   '.join(shown))}\n\n{indent(_text(completions[row]), '    ')}", flush=True)


def _text(entry: str | list[dict]) -> str:
    """A prompt or a completion as text; several messages are shown with their roles."""
    if isinstance(entry, str):
        text = entry
    elif len(entry) == 1:
        text = str(entry[0].get("content"))
    else:
        text = "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in entry)
    return visible(text.strip("\n"))


def visible(text: str) -> str:
    """
    Escape what a page or a terminal would hide or obey, as completions are untrusted.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: The text with control, direction and zero-width characters and lone surrogates as in a Python literal:
        `\\x1b`, `\\u202e`.
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


def _duration(seconds: float) -> str:
    """Two units at most: 45 s, 7 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
