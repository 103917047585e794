"""
Draw the report's figures, light and dark: accuracy against length, and each run's training curves.

They are legible at the width of a phone. The colours are Okabe and Ito's, which colour-blind people can tell apart, and
each kind of run has its own marker.
"""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from PIL import Image

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "muted": "#6e7781", "grid": "#e4e7ea"},
    "dark": {"paper": "#14171c", "ink": "#e6e8eb", "muted": "#8d96a0", "grid": "#2c3138"},
}
KINDS = {  # of runs, by how their names begin: marker, colour on light paper, on dark paper
    "base": ("X", "#1f2328", "#e6e8eb"),
    "sft": ("s", "#009e73", "#1fbf91"),
    "reinforce": ("o", "#0072b2", "#56b4e9"),
    "ppo": ("^", "#d55e00", "#f0803c"),
    "dpo": ("D", "#b8508c", "#cc79a7"),
    "": ("v", "#9a6a00", "#e69f00"),
}
WIDTH = 4.7  # inches; at this width a phone shows a point of text as a pixel or more


def _style(run_name: str, theme: str) -> tuple[str, str]:
    """Return the marker and colour of a run."""
    marker, *colours = next(style for kind, style in KINDS.items() if run_name.startswith(kind))
    return marker, colours[theme == "dark"]


def _figure(height: float, num_panels: int, theme: str) -> tuple[Figure, list]:
    colours = THEMES[theme]
    figure = Figure(figsize=(WIDTH, height), dpi=200, facecolor=colours["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for panel in panels:
        panel.set_facecolor(colours["paper"])
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(colours["muted"])
        panel.tick_params(which="both", colors=colours["muted"], labelsize=10)
        panel.grid(color=colours["grid"], linewidth=0.8)
        panel.set_axisbelow(True)
    return figure, panels


def _png(figure: Figure) -> bytes:
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", optimize=True)  # a third of the bytes
    return small.getvalue()


def draw_plane(runs: list, published: dict, published_base: str, theme: str) -> bytes:
    """
    Draw pass@1 against mean tokens of a completion, both with 95% intervals, and the published runs in grey.

    A run with another seed is a small point, joined to the run that it repeats. A dashed line marks the run `base`.

    Args:
        runs (`list`):
            The runs (`name`, `recipe`, `metrics`).
        published (`dict`):
            Tasks passed of 33 and mean tokens of each published run. May be empty.
        published_base (`str`):
            The model of the published runs.
        theme (`str`):
            `"light"` or `"dark"`.

    Returns:
        `bytes`: PNG.
    """
    colours = THEMES[theme]
    figure, (panel,) = _figure(4.5, 1, theme)
    published_points = [(tokens, passed / 33) for passed, tokens in published.values()]
    for point in published_points:
        panel.plot(*point, "o", markerfacecolor="none", color=colours["muted"], markersize=6)
    points = {run.name: (run.metrics["mean_completion_tokens"], run.metrics["pass_at_1"]) for run in runs}
    seeds = [run for run in runs if run.name != run.recipe and run.recipe in points]
    for run in seeds:
        marker, colour = _style(run.name, theme)
        panel.plot(*zip(points[run.recipe], points[run.name], strict=True), color=colour, linewidth=1.2)
        panel.plot(*points[run.name], marker, color=colour, markersize=5)
    named = [run for run in runs if run not in seeds]
    if "base" in points:
        panel.axhline(points["base"][1], color=colours["muted"], linewidth=1, linestyle="--")
    for run in named:
        marker, colour = _style(run.name, theme)
        x, y = points[run.name]
        faint = {"color": colour, "alpha": 0.25, "linewidth": 1.2}
        panel.plot([x, x], run.metrics["pass_at_1_interval"], **faint)
        panel.plot(run.metrics["mean_completion_tokens_interval"], [y, y], **faint)
        panel.plot(x, y, marker, color=colour, markersize=8, markeredgecolor=colours["paper"])
    x_values, y_values = zip(*points.values(), *published_points, strict=True)
    left, right = min(x_values) / 1.2, max(x_values) * 1.3
    names_share = min(0.5, 0.02 * max(len(run.name) for run in named))  # of the width, a character being 0.02
    panel.set_xscale("log")
    panel.set_xlim(left / (right / left) ** (names_share / (1 - names_share)), right)
    ticks = (5, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500)
    panel.set_xticks([tokens for tokens in ticks if left <= tokens <= right])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    top = max([run.metrics["pass_at_1_interval"][1] for run in named] + [*y_values])
    bottom = -0.04 if published else min(run.metrics["pass_at_1_interval"][0] for run in named) - 0.04
    panel.set_ylim(bottom, top + 0.06)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_xlabel("mean tokens of a completion (fewer is better)", color=colours["ink"], fontsize=11)
    panel.set_title("pass@1", loc="left", color=colours["ink"], fontsize=12)
    where = {"xy": (0.99, 0.99), "xycoords": "axes fraction", "ha": "right", "va": "top", "color": colours["muted"]}
    notes = [f"○ published, {published_base}"] * bool(published) + ["small: another seed"] * bool(seeds)
    panel.annotate("\n".join(notes), fontsize=10, backgroundcolor=colours["paper"], **where)
    height_of = top + 0.06 - bottom
    heights = _spread([(points[run.name][1] - bottom) / height_of for run in named], 0.05)
    for run, height in zip(named, heights, strict=True):
        panel.annotate(
            run.name,
            points[run.name],
            (names_share, height),
            textcoords="axes fraction",
            color=_style(run.name, theme)[1],
            fontsize=10,
            ha="right",
            va="center",
            parse_math=False,
            bbox={"facecolor": colours["paper"], "edgecolor": "none", "pad": 1},  # the base's line does not cross it
            arrowprops={"arrowstyle": "-", "color": _style(run.name, theme)[1], "linewidth": 0.8, "shrinkB": 4}
            | {"relpos": (1, 0.5)},  # from the middle of the name's right edge
        )
    return _png(figure)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move heights as little as possible, keeping their order, so that about `gap` or more is between them."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    spread = [heights[i] for i in order]
    for _ in range(1000):
        for i in range(len(spread) - 1):
            push = max(0.0, gap - (spread[i + 1] - spread[i])) / 2
            spread[i : i + 2] = spread[i] - push, spread[i + 1] + push
        lift = max(0.0, -spread[0])
        spread = [height + lift for height in spread]
    return [height for _, height in sorted(zip(order, spread, strict=True))]


def draw_training(runs: list, theme: str) -> dict[str, bytes]:
    """
    Draw each run's training curves: reward and tokens of a completion where the stage has rewards, else the loss.

    Panels of one kind share their scale, so that runs can be compared. Thin lines are as logged, thick ones a moving
    mean, dots the greedy evaluation during training.

    Args:
        runs (`list`):
            The runs (`name`, `training`).
        theme (`str`):
            `"light"` or `"dark"`.

    Returns:
        `dict[str, bytes]`: PNG of each run that has a training log, by its name.
    """
    titles = {"reward": "reward", "completion_tokens": "tokens of a completion", "loss": "loss"}
    titles["rewards/margins"] = "margin of the pairs"
    series = {}
    for run in runs:
        logged = {key: _series(run.training, key) for key in titles}
        chosen = ("reward", "completion_tokens") if logged["reward"] else ("loss", "rewards/margins")
        if shown := [key for key in chosen if logged[key]]:
            series[run.name] = {key: (logged[key], _series(run.training, f"eval_{key}")) for key in shown}
    # Rewards and lengths compare across runs, losses do not
    limits = {}
    for key in ("reward", "completion_tokens"):
        values = [value for run in series.values() for line in run.get(key, []) for _, value in line]
        if values:
            margin = (max(values) - min(values)) * 0.06 or 0.1
            limits[key] = (min(values) - margin, max(values) + margin)
    return {name: _draw_lines(name, lines, titles, limits, theme) for name, lines in series.items()}


def _series(training: list[dict], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in training if key in entry]


def _draw_lines(name: str, lines: dict, titles: dict, limits: dict, theme: str) -> bytes:
    colour = _style(name, theme)[1]
    figure, panels = _figure(2.3, len(lines), theme)
    for panel, (key, (logged, evaluated)) in zip(panels, lines.items(), strict=True):
        steps, values = zip(*logged, strict=True)
        half = max(1, len(values) // 12)
        near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
        panel.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        panel.plot(steps, [sum(part) / len(part) for part in near], color=colour, linewidth=2.2)
        if evaluated:
            panel.plot(*zip(*evaluated, strict=True), "o", color=THEMES[theme]["ink"], markersize=5)
        if key in limits:
            panel.set_ylim(*limits[key])
        panel.set_title(titles[key], loc="left", color=THEMES[theme]["ink"], fontsize=11)
        panel.set_xlabel("optimizer step", color=THEMES[theme]["muted"], fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(5))
    return _png(figure)
