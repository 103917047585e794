"""
Measure the uncertainty of numbers from few tasks: confidence intervals of rates and means, and whether two runs differ.

Not covered: corrections for multiple comparisons. Of the 36 pairs of nine equal runs, expect one or two below 0.05.
"""

from math import comb, sqrt

import numpy as np

NUM_RESAMPLES = 10_000
SEED = 0  # of the resamples
BOOTSTRAP = f"percentile bootstrap over tasks, {NUM_RESAMPLES} resamples"


def wilson_interval(rate: float, n: int) -> list[float]:
    """
    Return the 95% confidence interval of a rate (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    It holds for one sample per task. Several samples of one task are not independent: see [`bootstrap_interval`].

    Args:
        rate (`float`):
            Observed share of successes.
        n (`int`):
            Number of trials.

    Returns:
        `list[float]`: Lower and upper bound.
    """
    z = 1.959964  # the normal distribution's quantile at 97.5%
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, center - half), min(1.0, center + half)]


def bootstrap_interval(values: list[float]) -> list[float]:
    """
    Return the 95% confidence interval of a mean over tasks, by the percentile bootstrap over whole tasks (Efron 1979,
    https://doi.org/10.1214/aos/1176344552).

    It has no width where all values are equal, so it says nothing about a run that passes no task or all of them.

    Args:
        values (`list[float]`):
            One number per task, such as the share of its samples that pass.

    Returns:
        `list[float]`: Lower and upper bound.
    """
    array = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(SEED).integers(len(array), size=(NUM_RESAMPLES, len(array)))
    return np.quantile(array[drawn].mean(axis=1), [0.025, 0.975]).tolist()


def paired_gain(baseline: list[float], runs: list[list[float]]) -> tuple[float, list[float]]:
    """
    Return how far runs are above a baseline on the same tasks, with a 95% interval over tasks and seeds.

    A resample draws tasks, and runs too if there are several, as the runs of a recipe with different seeds are draws of
    what the recipe gives. With two or three runs this still understates how much seeds differ.

    Args:
        baseline (`list[float]`):
            One number per task of the baseline.
        runs (`list[list[float]]`):
            The same tasks' numbers of each run.

    Returns:
        `tuple[float, list[float]]`: The mean difference, and its lower and upper bound.
    """
    differences = np.asarray(runs, dtype=float) - np.asarray(baseline, dtype=float)
    num_runs, num_tasks = differences.shape
    generator = np.random.default_rng(SEED)
    tasks = generator.integers(num_tasks, size=(NUM_RESAMPLES, num_tasks))
    drawn = generator.integers(num_runs, size=(NUM_RESAMPLES, num_runs))
    of_each = np.stack([run[tasks].mean(axis=1) for run in differences], axis=1)
    means = np.take_along_axis(of_each, drawn, axis=1).mean(axis=1)
    return float(differences.mean()), np.quantile(means, [0.025, 0.975]).tolist()


def mcnemar_p(only_first: int, only_second: int) -> float:
    """
    Return the exact p value of McNemar's test (1947, https://doi.org/10.1007/BF02295996): how often two equally good
    runs would differ at least as much on the tasks that only one of them passes.

    Args:
        only_first (`int`):
            Number of tasks that the first run passes and the second does not.
        only_second (`int`):
            Number of tasks that the second run passes and the first does not.

    Returns:
        `float`: Two-sided p value, `min(1, 2 P[X <= min(b, c)])` with X binomial of b + c fair coins; 1 without any.
    """
    n = only_first + only_second
    tail = sum(comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)
