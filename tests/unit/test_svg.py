"""What is written beside the points of a frontier."""

from __future__ import annotations

import re

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
