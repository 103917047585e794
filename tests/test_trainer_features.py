"""What people expect of a TRL trainer: reward functions of all kinds, evaluation, logs, warnings, model cards."""

import asyncio
import signal
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load
from transformers import TrainerCallback

from recipes.common.provenance import training_log
from rewards import UnitTestReward
from sandbox import Sandbox
from trainers import PPOClipTrainer, ReinforceTrainer, generate_completions
from trainers.learning_signal import SignalWatch, collapse
from trainers.progress import print_progress_lines

PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n", "b"]


def build(trainer_class, model, output_dir, reward_funcs, prompts=PROMPTS, trainer_args=None, **settings):
    common = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return trainer_class(
        model,
        reward_funcs,
        trainer_class.config_class(str(output_dir), **(common | settings)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        **(trainer_args or {}),
    )


def test_rewards_run_where_trl_runs_them(tmp_path, tiny_model):
    """Rewards that use a signal, the thread's event loop, or a connection that belongs to the importing thread."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    connection = sqlite3.connect(":memory:")

    def with_alarm(completions, **kwargs):
        signal.alarm(20)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [1.0] * len(completions)

    def with_event_loop(completions, **kwargs):
        return asyncio.get_event_loop().run_until_complete(asyncio.sleep(0, [2.0] * len(completions)))

    def with_sqlite(completions, **kwargs):
        return [float(connection.execute("select 3").fetchone()[0]) for _ in completions]

    trainer = build(ReinforceTrainer, tiny_model, tmp_path, [with_alarm, with_event_loop, with_sqlite])
    try:
        trainer.train()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    assert trainer.state.log_history[0]["reward"] == 6.0


def test_a_step_in_which_nothing_was_scored_is_logged_and_read_again(tmp_path, tiny_model, capsys):
    """TRL logs None for the mean of nothing: no verdict, or the standard deviation of a single reward."""
    rewards = iter([None, 0.5])
    trainer = build(
        ReinforceTrainer,
        tiny_model,
        tmp_path,
        lambda completions, **kwargs: [next(rewards)],
        per_device_train_batch_size=1,
        max_steps=2,
    )
    print_progress_lines(trainer)
    trainer.train()
    trainer.save_state()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert ["reward" in line for line in lines] == [False, True]
    log = training_log(str(tmp_path))
    assert [entry.get("reward") for entry in log[:2]] == [None, 0.5]
    assert "reward_std" not in log[1]


def test_several_rewards_with_weights_some_async_some_silent(tmp_path, tiny_model):
    def per_prompt(prompts, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    async def second(completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    def silent_on_b(prompts, **kwargs):
        return [None if prompt == "b" else 1.0 for prompt in prompts]

    trainer = build(
        ReinforceTrainer, tiny_model, tmp_path, [per_prompt, second, silent_on_b], reward_weights=[0.5, 10.0, 100.0]
    )
    trainer.train()
    log = trainer.state.log_history[0]
    lengths = sum(map(len, PROMPTS)) / 4
    assert log["rewards/per_prompt/mean"] == lengths
    assert log["rewards/second/mean"] == 2.0
    assert log["rewards/silent_on_b/mean"] == 1.0
    assert log["reward"] == 0.5 * lengths + 10.0 * 2.0 + 100.0 * 3 / 4


def test_conversational_prompts(tmp_path, tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    build(
        ReinforceTrainer,
        tiny_model,
        tmp_path,
        reward,
        chats,
        {"processing_class": tiny_tokenizer},
        shuffle_dataset=False,
    ).train()
    assert [prompt for prompt, _ in seen] == chats
    assert all(len(reply) == 1 and reply[0]["role"] == "assistant" for _, reply in seen)


def test_evaluation_is_greedy_and_counts_every_task_once(tmp_path, tiny_model, tiny_tokenizer):
    """Three tasks in batches of two: the batches' means are not the mean over the tasks."""
    tasks = {
        "prompt": ["def one():\n    return 1\n#", "def one():\n    return 2\n#", "def one():\n    return 3\n#"],
        "test": ["def check(candidate):\n    assert candidate() == 1\n"] * 3,
        "entry_point": ["one"] * 3,
    }
    greedy = generate_completions(
        tiny_model, tiny_tokenizer(tasks["prompt"])["input_ids"], [tiny_tokenizer.eos_token_id], 3, temperature=0.0
    )
    texts = tiny_tokenizer.batch_decode(greedy, skip_special_tokens=True)
    seen = {}

    with Sandbox(timeout=2.0, workers=1) as sandbox:
        unit_tests = UnitTestReward(length_penalty=0.0, sandbox=sandbox)

        def reward(prompts, completions, **kwargs):
            seen.update(zip(prompts, completions, strict=True))
            return unit_tests(prompts=prompts, completions=completions, **kwargs)

        trainer = build(
            ReinforceTrainer,
            tiny_model,
            tmp_path,
            reward,
            trainer_args={"eval_dataset": Dataset.from_dict(tasks)},
            per_device_eval_batch_size=2,
            max_completion_length=3,
        )
        metrics = trainer.evaluate()
        expected = sum(unit_tests(tasks["prompt"], texts, tasks["test"], tasks["entry_point"]), start=0.0) / 3
    assert seen == dict(zip(tasks["prompt"], texts, strict=True))
    assert metrics["eval_pass_rate"] == pytest.approx(expected) == pytest.approx(1 / 3)


def test_metrics_of_a_step(tmp_path, tiny_model, capsys):
    task = {"test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "f"}
    logs = []

    class Collect(TrainerCallback):  # what any `report_to` receives
        def on_log(self, args, state, control, **kwargs):
            logs.append(kwargs["logs"])

    with Sandbox(timeout=2.0, workers=1) as sandbox:
        unit_tests = UnitTestReward(sandbox=sandbox)

        def reward(prompts, **kwargs):
            columns = {name: [value] * len(prompts) for name, value in task.items()}
            return unit_tests(prompts=prompts, **columns, **kwargs)

        build(
            PPOClipTrainer, tiny_model, tmp_path, reward, trainer_args={"callbacks": [Collect()]}, log_completions=True
        ).train()
    assert set(logs[0]) >= {
        *("loss", "reward", "pass_rate", "timeout_rate", "grad_norm", "entropy", "approx_kl", "frac_reward_zero_std"),
        *("completions/mean_length", "completions/clipped_ratio", "completion_tokens", "ratio/min", "ratio/max"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "rewards/reward/mean"),
        *(f"seconds/{phase}" for phase in ("rollout", "grading", "log_probs", "backward")),
    }
    assert logs[0]["seconds/rollout"] > 0 and logs[0]["seconds/backward"] > 0
    printed = capsys.readouterr().out
    # Four prompts, once each, and not again when training ends
    assert printed.count("prompt 4 of 4: ") == printed.count(": import re\n") == 1
    assert printed.count("verdict ") == 4 and "┃" not in printed


def test_approx_kl_is_of_the_old_policy_to_the_new_and_only_what_is_clipped_counts(tmp_path, tiny_model):
    trainer = build(PPOClipTrainer, tiny_model, tmp_path, lambda completions, **kwargs: [0.0] * 4)
    log_ratio = torch.tensor([-0.5, -0.5, 0.1, 1.0, 1.0, 1.0])
    old = torch.arange(-6.0, 0.0)
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0])  # clipped are the second, the fourth and the fifth
    inputs = {"old_per_token_logps": old[:, None], "completion_mask": torch.ones(6, 1), "advantages": advantages}
    trainer.policy_loss((old + log_ratio)[:, None], inputs)
    ratio = log_ratio.exp()
    metrics = {name: value.item() for name, value in trainer.measured.items()}
    assert metrics == pytest.approx(
        {
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_ratio/low_mean": 1 / 6,
            "clip_ratio/high_mean": 2 / 6,
            "clip_ratio/region_mean": 3 / 6,
            "ratio/min": ratio.min().item(),
            "ratio/max": ratio.max().item(),
        }
    )


@pytest.mark.parametrize(
    "pass_rate, message", [(0.0, "no completion has passed"), (1.0, "every completion has passed")]
)
def test_a_run_without_signal_says_so_once(tmp_path, tiny_model, caplog, pass_rate, message):
    def reward(completion_ids, log_extra, **kwargs):
        log_extra("verdict", ["passed" if pass_rate else "failed"] * len(completion_ids))
        return [pass_rate - len(ids) / 100 for ids in completion_ids]

    build(ReinforceTrainer, tiny_model, tmp_path, reward, max_steps=7).train()
    warnings = [record.message for record in caplog.records if "carry no signal" in record.message]
    assert len(warnings) == 1 and message in warnings[0]


@pytest.mark.parametrize(
    "rollouts, group_size, message",
    [
        ([[True], [False]] * 3, None, None),  # one completion a rollout, no baseline
        ([[True], [False]] * 3, 1, "all pass or none does"),  # and its own reward as its baseline
        ([[True, True, False, False]] * 5, 2, "all pass or none does"),  # groups of a prompt
        ([[True, True, False, False]] * 5, 4, None),
        ([[True, True, False, False]] * 4 + [[True, False, False, False]], 2, None),
        ([[True, True]] * 4, 2, None),  # too few rollouts to say
        ([[0.5, 0.5, 0.1, 0.1]] * 5, 2, "all rewards that are compared with each other are the same"),
        ([[0.5, 0.4, 0.1, 0.1]] * 5, 2, None),
    ],
)
def test_signal_is_a_difference_within_what_is_compared(caplog, rollouts, group_size, message):
    watch = SignalWatch()
    for outcomes in rollouts:
        watch.note(outcomes, group_size)
    assert [message in record.message for record in caplog.records] == ([True] if message else [])


def test_groups_that_all_pass_or_all_fail_are_noticed_under_a_length_penalty(tmp_path, tiny_model, caplog):
    def reward(prompts, completion_ids, log_extra, **kwargs):
        passed = [prompt in PROMPTS[:2] for prompt in prompts]
        log_extra("verdict", ["passed" if ok else "failed" for ok in passed])
        return [ok - len(ids) / 100 - i / 1000 for i, (ok, ids) in enumerate(zip(passed, completion_ids, strict=True))]

    group = {"baseline": "group", "num_generations": 2}
    build(ReinforceTrainer, tiny_model, tmp_path, reward, max_steps=6, **group).train()
    assert "all pass or none does" in caplog.text


@pytest.mark.parametrize(
    "log_history, messages",
    [
        ([{"entropy": value} for value in [0.15] * 5 + [0.09] * 4 + [0.03]], {}),
        (
            [{"entropy": value} for value in [0.16] * 5 + [0.07] * 5],
            {"entropy": "entropy fell from 0.16 to 0.07 (means of 5"},
        ),
        ([{"entropy": value} for value in [0.16] * 4 + [0.07] * 5], {}),
        ([{"eval_pass_rate": 0.3}, {"eval_pass_rate": 0.45}, {"eval_pass_rate": 0.31}], {}),
        (
            [{"eval_pass_rate": 0.3}, {"eval_pass_rate": 0.45}, {"eval_pass_rate": 0.29}],
            {"eval_pass_rate": "fell from 45.0% to 29.0%"},
        ),
        ([{"loss": 1.0}], {}),
        ([{"entropy": None, "eval_pass_rate": None}] * 10, {}),
    ],
)
def test_a_collapse_is_seen_in_the_log(log_history, messages):
    warnings = collapse(log_history)
    assert warnings.keys() == messages.keys()
    assert all(message in warnings[metric] for metric, message in messages.items())


class HighEntropiesAtFirst(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        state.log_history += [{"entropy": value} for value in [100.0] * 5 + [0.1] * 5]


def test_a_collapsing_run_warns_once_of_each_metric(tmp_path, tiny_model, caplog):
    rates = iter([0.9, 0.5, 0.4])

    def reward(completions, log_metric, **kwargs):
        if len(completions) == 2:  # of the evaluation
            log_metric("pass_rate", next(rates))
        return [1.0, 0.0, 0.0, 1.0][: len(completions)]

    evaluated = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})}
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(ReinforceTrainer, tiny_model, tmp_path, reward, trainer_args=evaluated, **settings)
    trainer.add_callback(HighEntropiesAtFirst())
    trainer.train()
    warnings = [record.message for record in caplog.records if "collapsing" in record.message]
    assert len(warnings) == 2 and "entropy fell from 100" in warnings[0] and "from 90.0% to 50.0%" in warnings[1]
    assert all("learning_rate" in warning for warning in warnings)


def test_a_run_with_signal_does_not_warn(tmp_path, tiny_model, caplog):
    build(ReinforceTrainer, tiny_model, tmp_path, lambda prompts, **kwargs: [1.0, 0.0, 0.0, 1.0], max_steps=7).train()
    assert "carry no signal" not in caplog.text


@pytest.mark.parametrize(
    "trainer_class, texts",
    [(PPOClipTrainer, ("PPO-Clip", "1707.06347")), (ReinforceTrainer, ("REINFORCE", "Williams"))],
)
def test_model_card(tmp_path, tiny_model, trainer_class, texts):
    trainer = build(trainer_class, tiny_model, tmp_path, lambda completions, **kwargs: [0.0] * 4)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert all(text in card for text in texts)


def test_push_to_hub_uploads_the_adapter_and_its_card(tmp_path, tiny_model, monkeypatch):
    """No Hub can be reached here: in its place stands what transformers asks of it."""
    uploaded = {}

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, **kwargs):
            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    reward = lambda completions, **kwargs: [1.0, 0.0, 0.0, 0.0]  # noqa: E731
    trainer = build(PPOClipTrainer, tiny_model, tmp_path, reward, push_to_hub=True, hub_model_id="me/tiny")
    trainer.train()
    trainer.push_to_hub()
    assert b"PPO-Clip" in uploaded["README.md"]
    trained = trainer.model.state_dict()
    saved = load(uploaded["adapter_model.safetensors"])
    assert saved, "the trained adapter"
    for name, value in saved.items():
        assert torch.equal(trained[name.replace(".weight", ".default.weight")], value), name
