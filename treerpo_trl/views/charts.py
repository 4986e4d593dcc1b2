"""Small line charts of numbers over the steps, with axes on which noise stays small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from .html import format_number
from .summary import Summary


WIDTH, HEIGHT, LEFT, MARGIN = 300, 100, 40, 6  # of the plot; the numbers of the scale stand left of it
MOST_POINTS = 60  # of a chart that marks each step


@dataclass(frozen=True, slots=True)
class Chart:
    """What a chart shows.

    Args:
        number: Name of the number in a [`Summary`].
        spec: How numbers are written.
        scale_spec: How they are on the scale.
        is_share: Whether they lie between 0 and 1, as rewards mostly do: then so does the scale.
    """

    number: str
    spec: str
    scale_spec: str
    is_share: bool = False


CHARTS = {
    "Mean reward": Chart("mean_reward", ".3f", "g", is_share=True),
    "Groups kept": Chart("kept_share", ".0%", ".0%", is_share=True),
    "Mean completion, tokens": Chart("mean_tokens", ",.0f", ",g"),
}


def draw_charts(summaries: Mapping[int, Summary]) -> str:
    """Figures in HTML, one a chart.

    Args:
        summaries: Step -> its numbers.
    """
    return "".join(_draw(name, chart, summaries) for name, chart in CHARTS.items())


def scale_of(low: float, high: float, is_share: bool) -> list[float]:
    """The numbers to write beside a chart, evenly spaced: from its bottom to its top.

    Args:
        low, high: Least and greatest number shown.
        is_share: See [`Chart`].

    Returns:
        0, 0.5, 1 for shares, if they are any. Else three to six round numbers that span the numbers shown and at least
        half of what they are around, so that noise does not fill the chart.
    """
    if is_share and low >= 0 and high <= 1:
        return [0.0, 0.5, 1.0]
    middle = (low + high) / 2
    half = max((high - low) / 2, abs(middle) / 4, 0.5)
    bottom, top = middle - half, middle + half
    if low >= 0 > bottom:
        bottom = 0.0
    rough = (top - bottom) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    return [round(tick * step, 9) for tick in range(first, max(last, first + 2) + 1)]


def _draw(name: str, chart: Chart, summaries: Mapping[int, Summary]) -> str:
    number_of = attrgetter(chart.number)
    numbers = {step: number for step, summary in summaries.items() if (number := number_of(summary)) is not None}
    newest = format_number(list(numbers.values())[-1] if numbers else None, chart.spec)
    caption = f"<figcaption><span>{name}</span><b>{newest}</b></figcaption>"
    if not numbers:
        return f"<figure>{caption}</figure>"
    steps, low, high = list(numbers), min(numbers.values()), max(numbers.values())
    ticks = scale_of(low, high, chart.is_share)

    def height(number: float) -> float:
        return HEIGHT * (ticks[-1] - number) / (ticks[-1] - ticks[0])

    def across(step: int) -> float:
        share = (step - steps[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.5
        return LEFT + MARGIN + share * (WIDTH - LEFT - 2 * MARGIN)

    scale = "".join(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{height(tick):.1f}" y2="{height(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{height(tick) + 4:.1f}" text-anchor="end">{tick:{chart.scale_spec}}</text>'
        for tick in ticks
    )
    line = " ".join(f"{across(step):.1f},{height(number):.1f}" for step, number in numbers.items())
    marks = "".join(
        f'<circle class="point" cx="{across(step):.1f}" cy="{height(number):.1f}" r="3">'
        f"<title>step {step:,}: {number:{chart.spec}}</title></circle>"
        for step, number in numbers.items()
        if len(steps) <= MOST_POINTS
    )
    label = (
        f"{name} from step {steps[0]:,} to step {steps[-1]:,}: {low:{chart.spec}} to {high:{chart.spec}}, now {newest}"
    )
    return (
        f'<figure>{caption}<svg viewBox="0 -8 {WIDTH} {HEIGHT + 28}" role="img" aria-label="{label}">{scale}'
        f'<text x="{LEFT}" y="{HEIGHT + 17}">step {steps[0]:,}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 17}" text-anchor="end">step {steps[-1]:,}</text>'
        f'<polyline class="line" points="{line}"/>{marks}</svg></figure>'
    )
