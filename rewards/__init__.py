"""Tasks and the reward: task, completion -> program -> sandbox -> number."""

from .programs import program_source, task_program, truncate_completion, trusted_setup
from .tasks import humaneval_test_ids, load_tasks
from .unit_tests import UnitTestReward


__all__ = [
    "UnitTestReward",
    "humaneval_test_ids",
    "load_tasks",
    "program_source",
    "task_program",
    "truncate_completion",
    "trusted_setup",
]
