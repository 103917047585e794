"""Read evaluated runs as `evaluate.py` writes them, and the published table that they are compared with."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.samples import read_lines, read_samples
from recipes.common.tables import read_metrics

# The published table: tasks passed of the same 33, and mean tokens. Its base is another, larger one.
PUBLISHED_BASE = "DeepSeek-Coder-1.3B"
PUBLISHED = {
    "base": (5, 177.3),
    "sft": (12, 136.3),
    "reinforce_alpha0.01": (16, 107.5),
    "reinforce_alpha0.03": (14, 136.2),
    "ppo_alpha0.01_bs4": (15, 89.6),
    "ppo_alpha0.03_bs4": (14, 66.3),
    "ppo_alpha0.01_bs8": (13, 80.3),
    "ppo_alpha0.03_bs8": (15, 92.9),
    "dpo": (15, 125.8),
}


def recipe_name(run_name: str) -> str:
    """
    Return the name of the run that a run repeats with another seed.

    Args:
        run_name (`str`):
            A run's name.

    Returns:
        `str`: `"sft"` of `"sft_seed43"`, and its own name of a run that repeats none.
    """
    return re.sub(r"_seed\d+$", "", run_name)


@dataclass
class Run:
    """
    An evaluated policy, one row of the table.

    Args:
        name (`str`):
            The folder's name.
        metrics (`dict`):
            Its `metrics.json`.
        samples (`dict[str, dict]`):
            Its graded completions by task id.
        sampled (`dict`, *optional*):
            `metrics.json` of an evaluation with several samples per task.
        training (`list[dict]`):
            The log of its training.
    """

    name: str
    metrics: dict
    samples: dict[str, dict] = field(default_factory=dict)
    sampled: dict | None = None
    training: list[dict] = field(default_factory=list)

    @property
    def recipe(self) -> str:
        """The run that this one repeats with another seed, else its own name."""
        return recipe_name(self.name)

    @property
    def passed(self) -> int:
        """Number of tasks passed, strictly."""
        return sum(sample["passed"] for sample in self.samples.values())


def read_runs(results: Path) -> list[Run]:
    """
    Read a results directory's runs: in the order of the published table, then others, each before its other seeds.

    Args:
        results (`Path`):
            The directory.

    Returns:
        `list[Run]`

    Raises:
        SystemExit: There is no run, a file is missing or not what `evaluate.py` writes, or a run is not greedy.
    """
    runs = []
    for path in sorted(results.glob("*/metrics.json")):
        folder = path.parent
        metrics, samples = read_metrics(folder), read_samples(folder)
        is_greedy = metrics["settings"]["temperature"] == 0
        if not is_greedy or len({sample["task_id"] for sample in samples}) != len(samples):
            raise SystemExit(f"{folder} holds samples: move them to {folder}/sampled, a greedy run belongs here")
        training = folder / "training.jsonl"
        runs.append(
            Run(
                folder.name,
                metrics,
                {sample["task_id"]: sample for sample in samples},
                read_metrics(folder / "sampled") if (folder / "sampled" / "metrics.json").is_file() else None,
                read_lines(training) if training.is_file() else [],
            )
        )
    if not runs:
        raise SystemExit(f"{results} holds no evaluated run (no ROW/metrics.json): write them with recipes/evaluate.py")
    known = list(PUBLISHED)

    def place(run):
        return known.index(run.recipe) if run.recipe in known else len(known), run.name

    return sorted(runs, key=place)
