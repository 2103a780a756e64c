"""Heatmaps show the numbers they are given."""

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.reports.plots import metrics_frame
from finetune.reports.routing_plots import plot_profile, plot_routing
from finetune.reports.routing_table import spans
from finetune.routing.plan import ExpertPlan
from tests.routing.profiles import profile_of


def rows():
    def row(step, load, overlap):
        routing = {"layers": [1, 3], "probe_load": load, "overlap": [overlap, 1.0]}
        return {"step": step, "router_overlap": (overlap + 1) / 2, "routing": routing}

    return [row(0, [[0.5, 0.5], [1.0, 0.0]], 1.0), {"step": 1, "loss": 2.0}, row(1, [[0.25, 0.75], [1.0, 0.0]], 0.8)]


def test_before_after_and_difference():
    figure = plot_routing(rows(), title="run")
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_xlabel() == "expert"]
    before, after, difference = (np.asarray(image) for image in images)
    assert before.tolist() == [[1.0, 1.0], [2.0, 0.0]]
    assert after.tolist() == [[0.5, 1.5], [2.0, 0.0]]
    assert np.allclose(difference, after - before)
    for axes in (axes for axes in figure.axes if axes.get_xlabel() == "expert"):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]  # decoder layers, not rows
    with pytest.raises(UserError, match="nothing about routing"):
        plot_routing([{"step": 1, "loss": 2.0}])


def test_a_profile_is_sorted_and_its_plan_marked():
    profile = profile_of([[1, 3, 0], [2, 2, 4]])
    figure = plot_profile(profile, ExpertPlan({1: (0,)}, 3))
    (axes,) = (axes for axes in figure.axes if axes.images)
    assert np.asarray(axes.images[0].get_array()).tolist() == [[2.25, 0.75, 0.0], [1.5, 0.75, 0.75]]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[], [1]]
    assert plot_profile(profile)


def test_tables_of_metrics_leave_out_what_is_there_by_layer():
    frame = metrics_frame(rows())
    assert list(frame.columns) == ["step", "router_overlap", "loss"]


def test_spans():
    assert spans((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert spans(()) == ""
