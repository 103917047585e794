"""Tasks as chat messages, and references in the form of their prompts."""

import pytest
from datasets import Dataset

from rewards import as_chat, load_tasks, reference_completion

PROMPT = "import math\n\ndef half(n):\n    return n // 2\n\ndef twice(n):\n    '''Return 2 n.'''\n"
TASK = {"task_id": "a", "prompt": PROMPT, "canonical_solution": "    return 2 * n\n", "entry_point": "twice"}
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, with the imports it needs, in one Python code "
    "block and nothing else."
)


def test_the_message_is_the_instruction_and_the_prompt_in_a_python_block():
    (task,) = as_chat(Dataset.from_list([TASK]))
    assert task == {
        "task_id": "a",
        "prompt": [{"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{PROMPT.rstrip()}\n```"}],
        "canonical_solution": PROMPT + "    return 2 * n\n",
        "entry_point": "twice",
        "setup": "import math\n\ndef half(n):\n    return n // 2\n",
    }
    (task,) = as_chat(Dataset.from_list([{**TASK, "setup": "import os\n"}]), instruction="Go on:", system="Be brief.")
    assert task["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Go on:\n\n```python\n{PROMPT.rstrip()}\n```"},
    ]
    assert task["setup"] == "import os\n"


def test_messages_stay_as_they_are():
    tasks = as_chat(load_tasks("humaneval", "test"), system="Old.")
    assert as_chat(tasks) is tasks
    again = as_chat(tasks, instruction="not used", system="New.")
    assert [len(task["prompt"]) for task in again] == [2] * 33
    assert [task["prompt"][1:] for task in again] == [task["prompt"][1:] for task in tasks]
    assert again[0]["prompt"][0] == {"role": "system", "content": "New."}
    assert again.remove_columns("prompt")[:] == tasks.remove_columns("prompt")[:]


def test_reference_in_the_form_of_the_prompt():
    assert reference_completion(TASK) == "    return 2 * n"
    (task,) = as_chat(Dataset.from_list([TASK]))
    content = f"```python\n{PROMPT}    return 2 * n\n```"
    assert reference_completion(task) == [{"role": "assistant", "content": content}]
    fenced = reference_completion({**task, "canonical_solution": "a = '''\n```\n'''"})
    assert fenced[0]["content"] == "````python\na = '''\n```\n'''\n````"
    with pytest.raises(ValueError, match="the task 'a' has no reference: fill in its field 'canonical_solution'"):
        reference_completion({**task, "canonical_solution": ""})
