"""
Sample completions of tasks, for evaluation and for preference pairs.

Not covered: several processes, and vLLM.
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from recipes.common.policy import load_policy
from recipes.common.prompts import prompt_token_ids
from trainers import decode_completions, generate_completions, run_device

# How many times as long as a batch's shortest prompt its longest may be
MAX_STRETCH = 4


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
    end = bar.n
    for rows in similar_lengths([*map(len, prompt_ids)], args.per_device_eval_batch_size):
        batch = generate_completions(
            model,
            [prompt_ids[row] for row in rows],
            eos_token_ids=eos_token_ids,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            on_ended=bar.update,
        )
        end += len(rows)
        bar.update(end - bar.n)  # those cut off at the length limit
        for row, ids in zip(rows, batch, strict=True):
            completion_ids[row] = ids
    completions = decode_completions(tokenizer, prompt_ids, completion_ids)
    return [
        {"task_id": tasks[i // args.num_generations]["task_id"], "completion": text, "completion_ids": ids}
        for i, (text, ids) in enumerate(zip(completions, completion_ids, strict=True))
    ]


def similar_lengths(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """
    Form batches of prompts of similar length, which need little padding.

    Args:
        lengths (`list[int]`):
            Tokens of each prompt.
        batch_size (`int`):
            Largest number of prompts in a batch.

    Yields:
        `list[int]`: Indices of a batch's prompts, short ones first. None is more than [`MAX_STRETCH`] times as long as
        the batch's shortest: one prompt of 1,400 tokens would make 127 others as long.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or lengths[i] > MAX_STRETCH * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
