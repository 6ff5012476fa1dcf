"""Line charts as plain SVG: axes with ticks, one legend, and a frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a3e9d", "#666666")
"""Those of Okabe and Ito, which people who do not see all colours can tell apart, and three more like them."""
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")
"""With the colours: lines that can be told apart."""
WIDTH, HEIGHT = 460, 340
"""Of a panel."""
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 44, 50
"""Of a panel, around its axes."""
ROW, LETTER = 18, 7
"""Of the legend: the height of a line, and about how wide a letter is."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in the order in which they are joined."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    frontier: Sequence[Point] = ()
    """Points that are ringed and joined by steps; each that is on one line only gets its name, where there is room."""
    whole_x: bool = False
    """Whether only whole numbers make sense on the x axis."""
    root_x: bool = False
    """Whether the x axis is spaced by square roots, so that a point far out does not crowd the others."""


def render(title: str, panels: Sequence[Panel]) -> str:
    """The panels side by side, and one legend below them: a name has the same colour and dashes everywhere."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    styles = {name: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, name in enumerate(names)}
    entries = [*names, *(["frontier"] if any(panel.frontier for panel in panels) else [])]
    width = WIDTH * len(panels)
    column = max([LETTER * len(name) for name in entries], default=0) + 56
    per_row = max(1, (width - LEFT) // column)
    height = 30 + HEIGHT + ROW * math.ceil(len(entries) / per_row) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 22, title, anchor="middle", size=16),
    ]
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate({i * WIDTH} 30)">', *_panel(panel, styles), "</g>"]
    for i, name in enumerate(entries):
        x, y = LEFT + i % per_row * column, 30 + HEIGHT + ROW * (i // per_row) + 10
        colour, dashes = styles.get(name, ("black", "2 2"))
        parts.append(_path(f"M{x} {y}h36", colour, dashes))
        parts.append(_text(x + 42, y + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, styles: dict[str, tuple[str, str]]) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    spaced = _root if panel.root_x else float
    xs, ys = ticks([spaced(x) for x, _ in points], whole=panel.whole_x), ticks([y for _, y in points])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(point: Point) -> tuple[float, float]:
        x = LEFT + (spaced(point[0]) - xs[0]) / (xs[-1] - xs[0]) * (right - LEFT)
        y = bottom - (point[1] - ys[0]) / (ys[-1] - ys[0]) * (bottom - TOP)
        return round(x, 1), round(y, 1)

    parts = [_text(WIDTH / 2, TOP - 14, panel.title, anchor="middle", size=14)]
    for tick in xs:
        value = tick * abs(tick) if panel.root_x else tick
        x, _ = at((value, ys[0]))
        parts += [_path(f"M{x} {TOP}V{bottom + 5}", "#dddddd"), _text(x, bottom + 18, f"{value:.6g}", anchor="middle")]
    for tick in ys:
        _, y = at((xs[0], tick))
        parts += [_path(f"M{LEFT - 5} {y}H{right}", "#dddddd"), _text(LEFT - 8, y + 4, f"{tick:g}", anchor="end")]
    parts.append(_path(f"M{LEFT} {TOP}V{bottom}H{right}", "black"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 14, panel.x, anchor="middle"))
    middle = (TOP + bottom) / 2
    parts.append(f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, panel.y, anchor="middle")}</g>')
    if not points:
        parts.append(_text((LEFT + right) / 2, middle, "nothing is measured yet", anchor="middle"))
    for line in panel.lines:
        colour, dashes = styles[line.name]
        places = [at(point) for point in line.points]
        parts.append(f"<g><title>{escape(line.name)}</title>")
        parts.append(_path("M" + "L".join(f"{x} {y}" for x, y in places), colour, dashes, width=1.8))
        parts += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>' for x, y in places]
        parts.append("</g>")
    if panel.frontier:
        places = [at(point) for point in panel.frontier]
        (x, y), *later = places
        parts.append(_path(f"M{x} {y}" + "".join(f"H{x}V{y}" for x, y in later), "black", "2 2"))
        parts += [f'<circle cx="{x}" cy="{y}" r="5.5" fill="none" stroke="black"/>' for x, y in places]
        parts += _names(panel, places)
    return parts


def _names(panel: Panel, places: Sequence[Point]) -> list[str]:
    """The names of the frontier's points, from the top, where there is room: to their upper left there is nothing else."""
    parts: list[str] = []
    written: list[tuple[float, float, float]] = []  # from where to where, and how low
    for point, (x, y) in reversed(list(zip(panel.frontier, places, strict=True))):
        names = [line.name for line in panel.lines if point in line.points]
        left, right = x - 8 - LETTER * len(names[0]), x - 8
        taken = any(left < end and begin < right and abs(y - low) < ROW - 6 for begin, end, low in written)
        if len(names) == 1 and left >= LEFT and not taken:
            parts.append(_text(right, y - 4, names[0], anchor="end", size=10))
            written.append((left, right, y))
    return parts


def ticks(values: Sequence[float], most: int = 7, *, whole: bool = False) -> list[float]:
    """Round numbers from below the smallest value to above the largest.

    >>> ticks([0.13, 0.92]), ticks([0, 1, 2], whole=True), ticks([])
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 1.0, 2.0], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    rough = max((high - low) / (most - 1), 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _path(shape: str, colour: str, dashes: str = "", width: float = 1) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{shape}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
