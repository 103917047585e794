"""Tasks and the reward: task, completion -> program -> sandbox -> number."""

from .chat import as_chat, reference_completion
from .programs import program_source, task_program, truncate_completion
from .shaping import CompilesReward, PartialReward, compiles_reward, length_reward, partial_reward
from .tasks import humaneval_test_ids, load_tasks
from .unit_tests import UnitTestReward, unit_test_reward

__all__ = [
    "CompilesReward",
    "PartialReward",
    "UnitTestReward",
    "as_chat",
    "compiles_reward",
    "humaneval_test_ids",
    "length_reward",
    "load_tasks",
    "partial_reward",
    "program_source",
    "reference_completion",
    "task_program",
    "truncate_completion",
    "unit_test_reward",
]
