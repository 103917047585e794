"""
Turn tasks into token ids, in one way for every stage: SFT, rollouts, preference pairs and evaluation.

A task's prompt is plain text that the policy continues (`completion`), or chat messages that it answers (`chat`). The
tokenizer's chat template is applied once. TRL's trainers, which take the prompts themselves, make the same ids.
"""

import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from rewards import as_chat, reference_completion

FORMATS = ("auto", "completion", "chat")
PROBE = [{"role": "user", "content": "Question"}]


@dataclass
class PromptArguments:
    """In which format the policy gets its prompts."""

    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "`completion`: the policy continues the prompt's text. `chat`: it answers chat messages, in the "
            "tokenizer's chat template. `auto`: `chat` if the tasks are chat messages, or if the model is an instruct "
            "model, which is one whose generations end with its chat template's end of turn; `completion` otherwise."
        },
    )
    chat_instruction: str | None = field(
        default=None,
        metadata={
            "help": "What the user asks for, before the task's prompt (chat). If not set, to complete the function and "
            "to answer with one Python code block."
        },
    )
    system_message: str | None = field(
        default=None,
        metadata={"help": "System message (chat). If not set, the one of the tasks or the chat template, if any."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Variables of the chat template (chat), in JSON: `{"enable_thinking": false}` for Qwen3.'},
    )

    def __post_init__(self):
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"chat_template_kwargs is no JSON: {error}") from None
        if self.prompt_format not in FORMATS:
            raise ValueError(f"prompt_format is {self.prompt_format!r}: write one of {', '.join(map(repr, FORMATS))}")
        if self.prompt_format == "completion":
            for name in ("chat_instruction", "system_message"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for chat, and prompt_format is 'completion': remove one of them")


def format_tasks(
    tasks: Dataset, args: PromptArguments, tokenizer: PreTrainedTokenizerBase, model_args: ModelConfig
) -> Dataset:
    """
    Give tasks the run's prompt format. In chat, the tokenizer's EOS token becomes its template's end of turn, and its
    template gets the values of `chat_template_kwargs`, so that whatever renders a prompt with it does so alike.

    Args:
        tasks ([`~datasets.Dataset`]):
            Tasks from [`load_stage_tasks`](arguments.py).
        args ([`PromptArguments`]):
            The format.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        model_args ([`~trl.ModelConfig`]):
            A base that passed [`check_policy`](policy.py).

    Returns:
        [`~datasets.Dataset`]: The tasks, their prompts as text or as messages.

    Raises:
        SystemExit: The tasks or the tokenizer do not allow the format.
    """
    variables = args.chat_template_kwargs or {}
    if not isinstance(variables, dict) or not all(map(str.isidentifier, variables)):
        raise SystemExit(f'chat_template_kwargs is {variables!r}: write names and values, {{"enable_thinking": false}}')
    are_messages = prompt_format(tasks) == "chat"
    if args.prompt_format == "completion" and are_messages:
        raise SystemExit("prompt_format: the tasks are chat messages: set prompt_format to chat")
    wants_chat = args.prompt_format == "chat" or are_messages
    if wants_chat and tokenizer.chat_template is None:
        raise SystemExit(
            f"prompt_format: chat needs a chat template, and the tokenizer of {model_args.model_name_or_path} has "
            "none: use the model's instruct version, or text prompts and prompt_format completion"
        )
    if args.prompt_format == "completion" or not (wants_chat or _is_instruct(tokenizer, model_args)):
        if variables:
            raise SystemExit("chat_template_kwargs is for chat, and the policy completes code here: leave it out")
        return tasks
    for name, value in variables.items():
        setting, template = f"{{%- set {name} = {value!r} %}}", tokenizer.get_chat_template()
        tokenizer.chat_template = template if setting in template else setting + template
    end = end_of_turn(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return as_chat(tasks, args.chat_instruction, args.system_message)


def prompt_format(tasks: Dataset) -> Literal["completion", "chat"]:
    """
    Return the format of tasks' prompts.

    Args:
        tasks ([`~datasets.Dataset`]):
            The tasks.

    Returns:
        `"completion"` for text, `"chat"` for messages.
    """
    return "completion" if isinstance(tasks[0]["prompt"], str) else "chat"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    Return the token that ends an assistant's turn in a chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `int` or `None`: The token's id, `None` if there is no template or it ends turns with plain text.
    """
    if tokenizer.chat_template is None:
        return None
    last = _rendered_reply(tokenizer, PROBE, [{"role": "assistant", "content": "Answer"}])[-1]
    return last if last in tokenizer.added_tokens_decoder or last in tokenizer.all_special_ids else None


def _is_instruct(tokenizer: PreTrainedTokenizerBase, model_args: ModelConfig) -> bool:
    """Base models often ship a chat template too, but their generations do not end with its end of turn."""
    end = end_of_turn(tokenizer)
    if end is None:
        return False
    try:
        config = GenerationConfig.from_pretrained(
            str(model_args.model_name_or_path), revision=model_args.model_revision
        )
    except OSError:  # the model has none
        return end == tokenizer.eos_token_id
    ends = config.eos_token_id
    return end in (tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends]))


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompts: list) -> list[list[int]]:
    """
    Tokenize prompts. This is what a policy sees before its completion, in every stage.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts, all text or all messages.

    Returns:
        `list[list[int]]`: Each prompt's token ids.
    """
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    rendered: Any = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return rendered["input_ids"]


def reference_token_ids(tokenizer: PreTrainedTokenizerBase, task: dict) -> tuple[list[int], list[int]]:
    """
    Tokenize a task's prompt and the completion that SFT teaches, which ends with EOS.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        task (`dict`):
            A task from [`format_tasks`].

    Returns:
        `tuple[list[int], list[int]]`: Token ids of the prompt and of the completion.

    Raises:
        ValueError: The task has no reference.
    """
    prompt, completion = task["prompt"], reference_completion(task)
    (prompt_ids,) = prompt_token_ids(tokenizer, [prompt])
    if not isinstance(completion, str):
        completion_ids = _rendered_reply(tokenizer, prompt, completion)
        if completion_ids[-1] != tokenizer.eos_token_id:
            completion_ids.append(tokenizer.eos_token_id)
        return prompt_ids, completion_ids
    # Tokenized together: some tokenizers put a space before whatever they tokenize alone
    whole = tokenizer(prompt + completion)["input_ids"]
    if whole[: len(prompt_ids)] == prompt_ids:
        completion_ids = whole[len(prompt_ids) :]
    else:  # a token would span the end of the prompt, and the policy never sees the prompt like that
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*completion_ids, tokenizer.eos_token_id]


def _rendered_reply(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], reply: list[dict]) -> list[int]:
    """Return the token ids of a reply in the template, up to and including its end of turn."""
    before: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole: Any = tokenizer.apply_chat_template([*prompt, *reply], tokenize=False)
    # Where the prompt opens a thought, some templates leave it out of the finished conversation
    text = whole[len(os.path.commonprefix([before, whole])) :]
    return tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
