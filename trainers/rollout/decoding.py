"""The text of a completion: what follows its prompt's text."""

from transformers import PreTrainedTokenizerBase

THOUGHT = "<think>"


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[str]:
    """
    Decode completions in the context of their prompts.

    A tokenizer in the manner of Llama's drops the leading space of whatever it decodes, so a completion decoded alone
    loses the first space of its indentation.

    Some chat templates open a thought in the prompt. Its tag is then put before the text, so that the text alone
    shows what is a thought, and that an unclosed thought is no answer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        prompt_ids (`list[list[int]]`):
            Token ids of each prompt.
        completion_ids (`list[list[int]]`):
            Token ids of each completion.

    Returns:
        `list[str]`: Each completion's text, without special tokens.
    """
    pairs = list(zip(prompt_ids, completion_ids, strict=True))
    prompts = tokenizer.batch_decode([prompt for prompt, _ in pairs], skip_special_tokens=True)
    whole = tokenizer.batch_decode([prompt + completion for prompt, completion in pairs], skip_special_tokens=True)
    alone = tokenizer.batch_decode([completion for _, completion in pairs], skip_special_tokens=True)
    texts = [
        text[len(prompt) :] if text.startswith(prompt) else completion
        for prompt, text, completion in zip(prompts, whole, alone, strict=True)
    ]
    return [
        f"{THOUGHT}\n{text}" if prompt.rstrip().endswith(THOUGHT) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
