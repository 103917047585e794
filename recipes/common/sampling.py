"""
Sample completions of tasks, for evaluation and for preference pairs.

Not covered: several processes, and vLLM.
"""

from typing import Any

from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from recipes.common.policy import load_policy
from recipes.common.prompts import prompt_token_ids
from trainers import decode_completions, generate_completions, run_device


def load_sampler(model_args: ModelConfig, adapter: str | None) -> PreTrainedModel | PeftModel:
    """
    Load a policy onto the run's device.

    Args:
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`](policy.py).
        adapter (`str`, *optional*):
            Directory of the adapter on it.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]
    """
    device = run_device()
    model = load_policy(model_args, device, adapter)
    if model.device.type != device.type:  # a 4-bit base is there already and cannot be moved
        model.to(device)
    return model


def complete(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Dataset, args: Any, bar: tqdm
) -> list[dict]:
    """
    Complete every task's prompt.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        tasks ([`~datasets.Dataset`]):
            The tasks.
        args:
            How to decode: `num_generations`, `per_device_eval_batch_size`, `max_completion_length`, `temperature`
            (0 is greedy) and `top_p`.
        bar ([`~tqdm.tqdm`]):
            Progress bar, advanced by one for each finished completion.

    Returns:
        `list[dict]`: `task_id`, `completion` and `completion_ids` of every completion, in the tasks' order and those of
        a task side by side. The ids are the tokens as emitted: the last one is EOS, unless the completion was cut off
        at the length limit.
    """
    ends: Any = model.generation_config.eos_token_id  # one, a list, or None
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    eos_token_ids = [token for token in ends if token is not None]
    prompt_ids = prompt_token_ids(tokenizer, tasks["prompt"][:])
    prompt_ids = [ids for ids in prompt_ids for _ in range(args.num_generations)]
    completion_ids: list[list[int]] = [[] for _ in prompt_ids]
    # Batches of prompts of similar length need less padding
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    start = bar.n
    for first in range(0, len(order), args.per_device_eval_batch_size):
        rows = order[first : first + args.per_device_eval_batch_size]
        batch = generate_completions(
            model,
            [prompt_ids[row] for row in rows],
            eos_token_ids=eos_token_ids,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            on_token=bar.update,
        )
        bar.update(start + first + len(rows) - bar.n)  # those cut off at the length limit
        for row, ids in zip(rows, batch, strict=True):
            completion_ids[row] = ids
    completions = decode_completions(tokenizer, prompt_ids, completion_ids)
    return [
        {"task_id": tasks[i // args.num_generations]["task_id"], "completion": text, "completion_ids": ids}
        for i, (text, ids) in enumerate(zip(completions, completion_ids, strict=True))
    ]
