"""
Tasks as chat messages, and a task's reference in the form of its prompt.

Not covered: the tokenizer's chat template, which the recipes apply.
"""

from typing import Any

from datasets import Dataset

from .programs import prompt_setup

INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, with the imports it needs, in one Python code "
    "block and nothing else."
)


def as_chat(tasks: Dataset, instruction: str | None = None, system: str | None = None) -> Dataset:
    """
    Return the same tasks with the prompt as chat messages.

    The user's message is the instruction and the task's prompt in a Python block. `canonical_solution` becomes the
    whole program, which is what the message asks for, and `setup` what the prompt defines beside the entry point,
    unless the tasks have the column. Tasks whose prompts are messages already keep them.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks from [`load_tasks`].
        instruction (`str`, *optional*):
            What to ask for. If `None`, [`INSTRUCTION`]. Not used for prompts that are messages already.
        system (`str`, *optional*):
            A system message to put first, in place of the one that is there.

    Returns:
        [`~datasets.Dataset`]: One task a row, in order.
    """
    if not len(tasks) or (system is None and not isinstance(tasks[0]["prompt"], str)):
        return tasks
    return Dataset.from_list([_chat_task(task, instruction or INSTRUCTION, system) for task in tasks])


def _chat_task(task: Any, instruction: str, system: str | None) -> dict:
    task, prompt = dict(task), task["prompt"]
    if isinstance(prompt, str):
        task["prompt"] = [{"role": "user", "content": f"{instruction}\n\n{python_block(prompt)}"}]
        task["setup"] = task.get("setup") or prompt_setup(prompt, task["entry_point"])
        if task.get("canonical_solution"):
            task["canonical_solution"] = prompt + task["canonical_solution"]
    if system is not None:
        others = [message for message in task["prompt"] if message["role"] != "system"]
        task["prompt"] = [{"role": "system", "content": system}, *others]
    return task


def reference_completion(task: dict) -> str | list[dict]:
    """
    Return the completion that a task's canonical solution makes, for supervised fine-tuning.

    Args:
        task (`dict`):
            A row of the tasks, from [`load_tasks`] or [`as_chat`]. Its canonical solution continues a plain text
            prompt, and is a whole program where the prompt is messages.

    Returns:
        `str` or `list[dict]`: The canonical solution for a plain text prompt; for messages the assistant's message,
        which is the program in a Python block. Trailing whitespace is dropped.

    Raises:
        ValueError: The task has no canonical solution.
    """
    reference = task.get("canonical_solution") or ""
    if not reference.strip():
        raise ValueError(
            f"the task {task.get('task_id')!r} has no reference: fill in its field 'canonical_solution', or leave the "
            "task out"
        )
    if isinstance(task["prompt"], str):
        return reference.rstrip()
    return [{"role": "assistant", "content": python_block(reference)}]


def python_block(source: str) -> str:
    """
    Put source code into a fenced block of a chat message.

    Args:
        source (`str`):
            The code; trailing whitespace is dropped.

    Returns:
        `str`: The block, without a newline at its end.
    """
    fence = "```"
    while fence in source:
        fence += "`"
    return f"{fence}python\n{source.rstrip()}\n{fence}"
