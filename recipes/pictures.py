"""
The pictures of the report, light and dark: runs in the plane of length and accuracy, and the course of each training.

Drawn to be read at the width of a phone. Colours are those of Okabe and Ito, which colour-blind people tell apart, and
each kind of run has a marker of its own as well.
"""

import io
from itertools import product
from math import cos, radians, sin

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
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
WIDTH = 5.4  # inches; a phone shows a point of text as about a pixel then


def _style(run_name: str, theme: str) -> tuple[str, str]:
    """Marker and colour of a run."""
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
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="png", optimize=True)  # a quarter of the bytes
    return small.getvalue()


def draw_plane(runs: list, published: dict, published_base: str, theme: str) -> bytes:
    """
    Every run as a point: mean tokens of a completion, and pass@1 with both 95% intervals; the published runs in grey.

    Args:
        runs (`list`):
            The runs (`name`, `metrics`).
        published (`dict`):
            Tasks passed of 33 and mean tokens of each published run.
        published_base (`str`):
            The model of the published runs.
        theme (`str`):
            `"light"` or `"dark"`.

    Returns:
        `bytes`: PNG.
    """
    colours = THEMES[theme]
    figure, (panel,) = _figure(4.7, 1, theme)
    theirs = [(tokens, passed / 33) for passed, tokens in published.values()]
    panel.plot(*zip(*theirs, strict=True), "o", markerfacecolor="none", color=colours["muted"], markersize=6)
    ours = [(max(run.metrics["mean_completion_tokens"], 1), run.metrics["pass_at_1"]) for run in runs]
    for run, (x, y) in zip(runs, ours, strict=True):
        marker, colour = _style(run.name, theme)
        for bounds, bar in (("pass_at_1_interval", "yerr"), ("mean_completion_tokens_interval", "xerr")):
            value = y if bar == "yerr" else x
            low, high = run.metrics[bounds]
            error = [[max(value - low, 0)], [max(high - value, 0)]]
            panel.errorbar(x, y, **{bar: error}, color=colour, alpha=0.22, linewidth=1.5)
        panel.plot(x, y, marker, color=colour, markersize=8, markeredgecolor=colours["paper"])
    panel.set_xscale("log")
    x_values = [x for x, _ in ours + theirs]
    panel.set_xlim(min(x_values) / 1.5, max(x_values) * 1.5)
    panel.set_ylim(-0.03, max(run.metrics["pass_at_1_interval"][1] for run in runs) + 0.12)
    ticks = [tokens for tokens in (5, 10, 20, 30, 50, 100, 200, 300, 500) if panel.get_xlim()[0] <= tokens]
    panel.set_xticks([tokens for tokens in ticks if tokens <= panel.get_xlim()[1]])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_xlabel("mean tokens of a completion (fewer is better)", color=colours["ink"], fontsize=11)
    panel.set_title("pass@1, strict, on the test tasks", loc="left", color=colours["ink"], fontsize=12)
    names = [(run.name, *point, _style(run.name, theme)[1]) for run, point in zip(runs, ours, strict=True)]
    names.append((f"published,\n{published_base}", *max(theirs), colours["muted"]))
    _place_labels(figure, panel, names, ours + theirs)
    return _png(figure)


def _place_labels(figure: Figure, panel, names: list[tuple], points: list[tuple]) -> None:
    """Write each name beside its point, in the nearest place where it hides no point and no other name."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are in pixels from here on
    renderer = figure.canvas.get_renderer()
    frame = panel.get_window_extent(renderer)
    dots = [panel.transData.transform(point) for point in points]
    taken = []
    for name, x, y, colour in names:
        at = panel.transData.transform((x, y))
        for distance, angle in product((12, 22, 34, 48, 64, 82, 102, 125, 150), range(0, 360, 15)):
            dx, dy = distance * cos(radians(angle)), distance * sin(radians(angle))
            label = panel.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                color=colour,
                fontsize=10,
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                va="center",
                parse_math=False,
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.6, "linewidth": 0.8, "shrinkB": 4},
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer).padded(3)  # without the arrow
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 20 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            free = not any(box.overlaps(other) for other in taken)
            if inside and free and not any(box.padded(8).contains(*dot) for dot in dots):
                break
            label.remove()
        # Where nothing is free the last, farthest place has to do
        taken.append(box)


def draw_training(runs: list, theme: str) -> dict[str, bytes]:
    """
    The course of each training: reward and tokens of a completion where the stage has rewards, else the loss.

    Panels of one kind share their scale, so that runs can be compared. Thin: as logged, thick: a moving mean, dots: the
    greedy evaluation during training.

    Args:
        runs (`list`):
            The runs (`name`, `training`).
        theme (`str`):
            `"light"` or `"dark"`.

    Returns:
        `dict[str, bytes]`: PNG of each run that has a training log, by its name.
    """
    titles = {"reward": "reward", "completion_tokens": "tokens of a completion", "loss": "loss"}
    titles["rewards/margins"] = "margin of chosen over rejected"
    series = {}
    for run in runs:
        logged = {key: _series(run.training, key) for key in titles}
        chosen = ("reward", "completion_tokens") if logged["reward"] else ("loss", "rewards/margins")
        if shown := [key for key in chosen if logged[key]]:
            series[run.name] = {key: (logged[key], _series(run.training, f"eval_{key}")) for key in shown}
    # The scale of rewards and lengths is that of all runs; a loss of one stage means nothing to another
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
