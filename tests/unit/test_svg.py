"""What is written beside the points of a frontier."""

from __future__ import annotations

import re
from itertools import pairwise

from onlinerl.views.svg import Line, Panel, render


def names(lines: dict[str, list[tuple[float, float]]], frontier: list[tuple[float, float]]) -> list[str]:
    """Those that the plot has above its legend, from the top."""
    panel = Panel(title="t", x="x", y="y", lines=[Line(name=n, points=p) for n, p in lines.items()], frontier=frontier)
    return re.findall(r'font-size="10">([^<]+)<', render("plot", [panel]))


def test_points_of_the_frontier_have_their_names() -> None:
    lines = {"far": [(0, 0), (10, 1.0)], "near": [(0, 0), (5, 0.8)], "below": [(0, 0), (8, 0.3)]}
    assert names(lines, [(0, 0), (5, 0.8), (10, 1.0)]) == ["far", "near"]  # and none that all lines go through


def test_no_name_is_written_over_another_one_or_over_the_axis() -> None:
    lines = {"first": [(9.9, 0.98)], "second": [(10.0, 1.0)], "beside the axis": [(0.1, 0.5)]}
    assert names(lines, [(0.1, 0.5), (9.9, 0.98), (10.0, 1.0)]) == ["second"]
    assert names({"one": [(0, 0), (5, 1.0)], "two": [(0, 0), (10, 1.01)]}, [(5, 1.0), (10, 1.01)]) == [
        "two",
        "one",
    ]  # level, with room between


def test_an_axis_spaced_by_roots_says_values() -> None:
    panel = Panel(
        title="t", x="x", y="y", lines=[Line(name="n", points=[(-1.0, 0.0), (0, 0.2), (4, 0.5), (64, 1.0)])], root_x=True
    )
    plot = render("plot", [panel])
    places = {
        float(value): float(x)
        for x, value in re.findall(r'<text x="([\d.]+)" y="308" text-anchor="middle" [^>]*>([^<]+)<', plot)
    }
    assert list(places) == [-4, 0, 4, 16, 36, 64]
    assert all(abs(b - a - (places[0] - places[-4])) < 0.11 for a, b in pairwise(places.values())), "equally far apart"
    assert f'<circle cx="{places[4]:g}"' in plot
