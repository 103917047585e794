"""Progress: what is shown of a trainer's logs and completions, and that nobody but the main process prints."""

import re
from collections import deque

from datasets import Dataset
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer

from trainers.progress import ProgressLine, _duration, print_completions, print_progress_lines


def show(capsys, logs, step=12, **state):
    line = ProgressLine()
    line.on_train_begin(None, TrainerState(global_step=step - 1, max_steps=120), None)
    line.on_log(
        None, TrainerState(global_step=step, max_steps=120, **{"is_world_process_zero": True, **state}), None, logs
    )
    return re.sub(r"[\d.]+ (s|min)\b", r"N \1", capsys.readouterr().out)


def test_a_line_shows_what_its_stage_logs(capsys):
    rl = {"loss": 0.1, "reward": 0.378, "pass_rate": 0.40625, "completion_tokens": 85.25, "kl": 0.0021, "entropy": 1.0}
    assert (
        show(capsys, rl) == "step  12/120   pass rate 0.406   tokens 85.2   reward 0.378   KL 0.0021   N s   N s left\n"
    )
    ppo = {"reward": 1.0, "clip_ratio/region_mean": 0.0625, "completions/mean_length": 20.0}
    assert show(capsys, ppo) == "step  12/120   tokens 20   reward 1   clipped 0.0625   N s   N s left\n"
    dpo = {"loss": 0.69314, "rewards/accuracies": 0.5, "rewards/margins": 0.001234, "grad_norm": 3.0}
    assert show(capsys, dpo) == "step  12/120   loss 0.693   accuracy 0.5   margin 0.00123   N s   N s left\n"
    assert show(capsys, {"eval_reward": 0.5}) == "step  12/120   evaluation   reward 0.5\n"
    assert show(capsys, {"train_runtime": 1.0}) == "trained to step 12 in N s\n"
    assert show(capsys, rl, is_world_process_zero=False) == ""


def test_durations_have_a_readable_unit():
    assert [_duration(seconds) for seconds in (0.4, 89, 90, 3600, 7300)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "2 h 2 min",
    ]


def test_a_trainer_prints_lines_and_keeps_its_log(tmp_path, tiny_model, tiny_tokenizer, capsys):
    args = SFTConfig(str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 2)
    trainer = SFTTrainer(tiny_model, args=args, train_dataset=data, processing_class=tiny_tokenizer)
    print_progress_lines(trainer)
    capsys.readouterr()
    trainer.train()
    first, second, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1/2   loss [\d.]+   [\d.]+ s   \d+ s left", first)
    assert re.fullmatch(r"step 2/2   loss [\d.]+   [\d.]+ s   0 s left", second)
    assert last.startswith("trained to step 2 in ")
    assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy"} <= trainer.state.log_history[0].keys()


def test_completions_are_readable_below_their_prompt(capsys):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write one()."}]
    reply = "```python\ndef one():\n    return 1\n```"
    logs = {
        "prompt": deque(["def two():\n", "def two():\n", chat]),
        "completion": deque(["    return 2", "    \x1b[2J\u202e", [{"role": "assistant", "content": reply}]]),
        "rewards": {"unit_tests": deque([0.9976, float("nan"), 0.0])},
        "advantages": deque([0.5, 0.0, -0.5]),
        "extra": {"verdict": deque(["passed", "invalid", "failed"]), "completion_tokens": deque([24, 3, 12])},
    }
    print_completions(logs, step=12)
    everything = capsys.readouterr().out
    assert (
        everything
        == """
step 12, prompt 1 of 2: def two():

unit_tests 0.998   advantage 0.5   verdict passed   completion_tokens 24

        return 2

unit_tests nan   advantage 0   verdict invalid   completion_tokens 3

        \\x1b[2J\\u202e

step 12, prompt 2 of 2: system: Be brief.

user: Write one().

unit_tests 0   advantage -0.5   verdict failed   completion_tokens 12

    ```python
    def one():
        return 1
    ```
"""
    )
    print_completions(logs, step=12, num_completions=1)
    assert everything.startswith(capsys.readouterr().out + "\nunit_tests nan")
    print_completions(logs, step=12, num_completions=0)
    assert capsys.readouterr().out == ""
