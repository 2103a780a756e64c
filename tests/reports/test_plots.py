import pytest

from finetune.reports.plots import metrics_frame, plot_loss, smooth

ROWS = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 2.5, "eval_exact_match": 0.1},
]


def test_evaluation_stands_beside_its_step():
    frame = metrics_frame(ROWS)
    assert frame["step"].tolist() == [1, 2]
    assert frame["eval_loss"].tolist()[1] == 2.5
    assert frame["loss"].tolist() == [3.0, 2.0]


def test_the_figure_shows_training_and_held_out_loss():
    axes = plot_loss(ROWS, title="run").axes[0]
    lines = [list(line.get_ydata()) for line in axes.lines]
    assert lines[0] == [3.0, 2.0]
    assert lines[-1] == [2.5]
    assert "nats" in axes.get_ylabel()


def test_a_run_without_evaluation_still_plots():
    assert len(plot_loss(ROWS[:2]).axes[0].lines) == 2


def test_smoothing_starts_at_the_first_value():
    assert smooth([4.0])[0] == pytest.approx(4.0)
    assert smooth([1.0] * 20)[-1] == pytest.approx(1.0)
