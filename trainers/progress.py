"""Print training's progress: one line a logged step, on one process. The full record stays in the trainer's log."""

import time

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
    Print one line for each log entry: step, the stage's main metrics, seconds a step, time left.

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
            if name in logs and title not in shown and not (name == "loss" and "reward" in logs):
                shown[title] = f"{title} {float(logs[name]):.3g}"
        parts += shown.values()
        if not is_evaluation and step > self._last_step:
            parts.append(f"{(now - self._last_time) / (step - self._last_step):.1f} s")
            left = (state.max_steps - step) * (now - self._started) / (step - self._first_step)
            parts.append(f"{_duration(left)} left")
            self._last_step, self._last_time = step, now
        print("   ".join(parts), flush=True)


def _duration(seconds: float) -> str:
    """Two units at most: 45 s, 7 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
