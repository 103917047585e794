"""
Completions of tasks from a policy: what evaluation and preference sampling share.

Not covered: several processes, and vLLM.
"""

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from trainers import generate_completions


def adapter_sha256(adapter: str) -> str:
    """
    What tells one trained adapter from another in the same place.

    Args:
        adapter (`str`):
            Directory of the adapter.

    Returns:
        `str`: SHA-256 of its weights.
    """
    return hashlib.sha256(Path(adapter, "adapter_model.safetensors").read_bytes()).hexdigest()


def complete(model, tokenizer, tasks, args, bar: tqdm) -> list[dict]:
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
            Progress bar, advanced by one for each completion that ends.

    Returns:
        `list[dict]`: For each task in order and each of its completions `task_id`, `completion` and `completion_ids`,
        the tokens as emitted: EOS is the last one, unless the completion was cut off at the length limit.
    """
    if torch.cuda.is_available():
        model.to("cuda")
    eos_token_ids = model.generation_config.eos_token_id
    eos_token_ids = {tokenizer.eos_token_id, *(eos_token_ids if isinstance(eos_token_ids, list) else [eos_token_ids])}
    prompt_ids = [ids for ids in tokenizer(tasks["prompt"][:])["input_ids"] for _ in range(args.num_generations)]
    completion_ids = [None] * len(prompt_ids)
    # Prompts of similar length together: less padding
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    start = bar.n
    for first in range(0, len(order), args.per_device_eval_batch_size):
        rows = order[first : first + args.per_device_eval_batch_size]
        batch = generate_completions(
            model,
            [prompt_ids[row] for row in rows],
            eos_token_ids=[token for token in eos_token_ids if token is not None],
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            on_token=bar.update,
        )
        bar.update(start + first + len(rows) - bar.n)  # those cut off at the length limit
        for row, ids in zip(rows, batch, strict=True):
            completion_ids[row] = ids
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [
        {"task_id": tasks[i // args.num_generations]["task_id"], "completion": text, "completion_ids": ids}
        for i, (text, ids) in enumerate(zip(completions, completion_ids, strict=True))
    ]
