"""What the tests of the trainers' formulas share: a policy, a recording reward, and an update by plain forwards."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n\n\ndef long_name(x):\n", "b"]
COMMON = {
    "max_completion_length": 6,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 3,
}


def policy(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def dataset(repeats=1):
    return Dataset.from_dict({"prompt": PROMPTS * repeats})


class RecordingReward:
    """A deterministic reward that keeps the rollouts it was asked about."""

    __name__ = "recording"

    def __init__(self):
        self.rollouts = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        rewards = [0.5 - (sum(ids) % 7) / 3 for ids in completion_ids]
        self.rollouts.append((prompts, completion_ids, rewards))
        return rewards


def train_with_sgd(trainer_class, config, model, learning_rate):
    reward = RecordingReward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    trainer = trainer_class(model, reward, config, train_dataset=dataset(), optimizers=(optimizer, None))
    trainer.train()
    return reward, trainer


def log_prob(model, tokenizer, prompt, completion):
    """Of a whole completion, by a plain forward of it alone."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    logits = model(torch.tensor([prompt_ids + completion])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion].sum()


def reference_update(model, tokenizer, rollout, learning_rate, num_epochs, loss_of):
    """The independent reference: plain forwards, a loss, a step of SGD."""
    prompts, completion_ids, rewards = rollout
    parameters = [p for p in model.parameters() if p.requires_grad]
    old = None
    for _ in range(num_epochs):
        log_probs = torch.stack([log_prob(model, tokenizer, *row) for row in zip(prompts, completion_ids, strict=True)])
        old = log_probs.detach() if old is None else old
        gradients = torch.autograd.grad(loss_of(log_probs, old, torch.tensor(rewards)), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= learning_rate * gradient


def reinforce_loss(log_probs, old, rewards):
    return -(rewards * log_probs).mean()


def ppo_clip_loss(log_probs, old, rewards):
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
