"""
What `reinforce.py` and `ppo_clip.py` run: from the settings to the saved adapter.

The policy is the base with the SFT stage's adapter, which is trained on while the base stays frozen; without one, a
new adapter is put on the base. The reward runs every completion against its task's tests in the sandbox.
"""

from dataclasses import dataclass, field

from common import (
    TaskArguments,
    check_policy,
    check_timeout,
    load_policy,
    load_stage_tasks,
    load_tokenizer,
    parse_settings,
)
from run_directory import RunDirectory
from sampling import adapter_sha256
from trl import ModelConfig, get_peft_config

from rewards import UnitTestReward
from sandbox import Sandbox


@dataclass
class RLArguments(TaskArguments):
    """
    What an RL stage adds: where its policy comes from and what it is paid for.

    Args:
        adapter_name_or_path (`str`, *optional*):
            Directory of the adapter to continue from, usually the SFT stage's. If `None`, a new one is trained.
        length_penalty (`float`, *optional*, defaults to `0.01`):
            Price of 100 generated tokens, at least 0.
        sandbox_timeout (`float`, *optional*, defaults to `5.0`):
            Seconds a program may take.
        dataset_test_split (`str`, *optional*, defaults to `"validation"`):
            The split that is completed greedily during training when `eval_strategy` is set; train on `"fit"` then, to
            see tasks that are not trained on.
    """

    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory of the adapter to continue from, usually the SFT stage's."}
    )
    length_penalty: float = field(default=0.01, metadata={"help": "Price of 100 generated tokens, at least 0."})
    sandbox_timeout: float = field(default=5.0, metadata={"help": "Seconds a program may take."})
    dataset_test_split: str = field(
        default="validation", metadata={"help": "The split completed greedily during training, with eval_strategy."}
    )

    def __post_init__(self):
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty is {self.length_penalty}: write 0 or more, it is subtracted")
        check_timeout(self.sandbox_timeout)


def train_policy_gradient(stage: str, trainer_class: type, config_class: type) -> None:
    """
    An RL stage from its settings to the saved adapter.

    Args:
        stage (`str`):
            The stage's name.
        trainer_class (`type`):
            [`~trainers.ReinforceTrainer`] or [`~trainers.PPOClipTrainer`].
        config_class (`type`):
            The configuration that it takes.
    """
    rl, args, model_args, settings = parse_settings(RLArguments, config_class, ModelConfig)
    check_policy(model_args, rl.adapter_name_or_path)
    if rl.adapter_name_or_path:
        settings["adapter_sha256"] = adapter_sha256(rl.adapter_name_or_path)
    else:
        model_args.use_peft = True  # whatever the recipe says: the base stays frozen
    run = RunDirectory(args.output_dir, stage, settings)
    if run.finished:
        return print(f"{args.output_dir}: this run has finished")
    train_dataset = load_stage_tasks(rl.dataset_name, rl.dataset_train_split)
    eval_dataset = None
    if args.eval_strategy != "no":
        eval_dataset = load_stage_tasks(rl.dataset_name, rl.dataset_test_split)

    checkpoint = run.start()
    with Sandbox(timeout=rl.sandbox_timeout) as sandbox:
        trainer = trainer_class(
            model=load_policy(model_args, rl.adapter_name_or_path),
            reward_funcs=UnitTestReward(rl.length_penalty, sandbox),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_tokenizer(model_args, padding_side="left"),
            peft_config=None if rl.adapter_name_or_path else get_peft_config(model_args),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()  # before the adapter: who finds that finds the log too
    trainer.save_model()
    run.finish()
