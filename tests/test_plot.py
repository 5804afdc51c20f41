"""Pictures, as objects: what is drawn where, by what name."""

import subprocess
import sys
from typing import Any

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_rgb

import torchjd_func as jd
from tests.helpers import close, double
from tests.matrices import matrix
from torchjd_func.plot._cone import _dual_cone

plot: Any = jd.plot  # what matplotlib returns is only loosely typed
RECORDS = [
    {"losses": {"a": torch.tensor(1.0 / i), "b": torch.tensor(2.0)}, "gap": torch.tensor(float(i))}
    for i in range(1, 6)
]
PICTURES = {
    "trajectories": lambda ax: plot.trajectories(double(0, 0, 1, 1).reshape(2, 2), ax=ax),
    "cone": lambda ax: plot.cone(torch.eye(2), {"mean": torch.ones(2)}, ax=ax),
    "conflict_matrix": lambda ax: plot.conflict_matrix(torch.eye(3), ax=ax),
    "front": lambda ax: plot.front(torch.eye(2), ax=ax),
    "training": lambda ax: plot.training([{"gap": r["gap"]} for r in RECORDS], ax=ax),
}


@pytest.fixture(autouse=True)
def close_figures():
    pyplot.close("all")
    yield
    pyplot.close("all")


def first(axes):
    return axes[0] if isinstance(axes, tuple) else axes


def labels(axis):
    return axis.get_legend_handles_labels()[1]


@pytest.mark.parametrize("name", PICTURES)
def test_a_given_axis_is_drawn_on(name):
    axis: Any = pyplot.subplots()[1]
    assert first(PICTURES[name](axis)) is axis
    assert axis.has_data()
    assert len(pyplot.get_fignums()) == 1


@pytest.mark.parametrize("name", PICTURES)
def test_new_figures_are_dark_on_white_in_a_dark_style(name):
    with mpl.rc_context():
        pyplot.style.use("dark_background")
        axis = first(PICTURES[name](None))
        assert mpl.rcParams["figure.facecolor"] == "black", "the style around is left alone"
        axis.figure.canvas.draw()
    for face in (axis.get_facecolor(), axis.figure.get_facecolor()):
        assert to_rgb(face) == (1, 1, 1)
    texts = [axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels()]
    legend = axis.get_legend()
    for text in [*texts, *(legend.get_texts() if legend else [])]:
        assert max(to_rgb(text.get_color())) < 0.5


@pytest.mark.parametrize("name", PICTURES)
def test_the_missing_library_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"'\.\[plot\]'"):
        PICTURES[name](None)


def test_the_package_does_not_import_matplotlib():
    code = "import sys, torchjd_func; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trajectories_have_a_path_for_each_run_and_one_name():
    points = torch.arange(24.0).reshape(3, 4, 2)
    axis = plot.trajectories(points, lambda x: {"a": x[0], "b": x[1] ** 2}, label="mgda")
    paths = [torch.as_tensor(line.get_xydata()) for line in axis.lines]
    close(torch.stack(paths), points.double())
    starts, ends = (torch.as_tensor(c.get_offsets()) for c in axis.collections[-2:])
    close(starts, points[:, 0].double())
    close(ends, points[:, -1].double())
    assert labels(axis) == ["mgda"]


def test_trajectories_draw_contours_of_the_mean_loss():
    limits = (-2.0, 2.0, -1.0, 1.0)
    points = torch.zeros(1, 2)
    axis = plot.trajectories(points, lambda x: (x[0], 3 * x[0]), limits=limits)
    contours = axis.collections[0]
    paths = zip(contours.levels, contours.get_paths(), strict=True)
    # The mean of x and 3 x is 2 x: contours are vertical.
    found = [(level, x) for level, path in paths for x, _ in path.vertices]
    assert len(found) > 100
    close(torch.tensor([2 * x for _, x in found]), [level for level, _ in found], atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_dual_cone_by_sampling(seed):
    rows = matrix("gaussian", 2 + seed % 3, 2, seed)
    corners = torch.tensor(_dual_cone(rows.tolist(), 1.0), dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 41).double()] * 2)
    area = (grid @ rows.T >= 0).all(1).double().mean() * 4
    turned = corners.roll(-1, 0)
    polygon = (corners[:, 0] * turned[:, 1] - corners[:, 1] * turned[:, 0]).sum() / 2
    assert abs(polygon - area) < 0.2
    assert ((corners @ rows.T) >= -1e-9).all()


def test_dual_cone_of_opposite_gradients_is_a_line():
    corners = _dual_cone([[1.0, 0.0], [-1.0, 0.0]], 1.0)
    assert {x for x, _ in corners} == {0.0}


def test_cone_has_an_arrow_for_each_gradient_and_direction():
    rows = double(1, 0, -1, 2).reshape(2, 2)
    axis = plot.cone(rows, {"mean": rows.mean(0)})
    tips = [torch.as_tensor(line.get_xydata()[1]) for line in axis.lines]
    close(torch.stack(tips), torch.cat([rows, rows.mean(0, keepdim=True)]))
    assert labels(axis) == ["dual cone", "gradients", "mean"]
    low, high = axis.get_xlim()
    assert low <= -(5**0.5)
    assert high >= 5**0.5


@pytest.mark.parametrize("rows", [torch.zeros(2, 2), torch.zeros(0, 2)])
def test_cone_of_nothing_is_the_plane(rows):
    axis = plot.cone(rows)
    assert len(axis.patches[0].get_xy()) == 5


def test_conflict_matrix_shows_the_cosines():
    gramian = double(4, -3, 0, -3, 9, 0, 0, 0, 0).reshape(3, 3)
    axis = plot.conflict_matrix(gramian, ["a", "b", "c"])
    close(torch.as_tensor(axis.images[0].get_array()), jd.metrics.pairwise_cosine(gramian))
    assert axis.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a", "b", "c"]
    assert len(axis.texts) == 9
    assert axis.figure.axes[1].get_ylabel() == "cosine of gradients"


@pytest.mark.parametrize("m", [1, 2, 3, 9, 40])
def test_conflict_matrix_counts_objectives_in_integers(m):
    axis = plot.conflict_matrix(torch.eye(m))
    for ticks, (low, high) in ((axis.get_xticks(), axis.get_xlim()), (axis.get_yticks(), (0, m))):
        shown = [tick for tick in ticks if min(low, high) <= tick <= max(low, high)]
        assert shown
        assert all(tick == round(tick) for tick in shown)


def test_conflict_matrix_of_many_has_no_numbers():
    assert not plot.conflict_matrix(torch.eye(9)).texts


def test_training_has_a_panel_for_each_quantity():
    axes = plot.training(RECORDS, units={"losses": "nats"}, log=["losses"], window=2)
    assert [axis.get_ylabel() for axis in axes] == ["losses (nats)", "gap"]
    assert [axis.get_yscale() for axis in axes] == ["log", "linear"]
    assert labels(axes[0]) == ["a", "b"]
    assert labels(axes[1]) == []
    close(
        torch.as_tensor(axes[1].lines[0].get_xydata()), [[i + 0.5 + 0.5, i + 1.5] for i in range(4)]
    )


def test_training_names_vectors_by_the_losses_in_the_order_in_which_they_count():
    losses = {"policy": torch.tensor(1.0), "entropy": torch.tensor(2.0)}
    records = [{"losses": losses, "weights": torch.tensor([0.25, 0.75])}] * 2
    first, second = plot.training(records)
    assert labels(first) == labels(second) == ["entropy", "policy"]
    assert [line.get_ydata()[0] for line in first.lines] == [2.0, 1.0]
    assert [line.get_ydata()[0] for line in second.lines] == [0.25, 0.75]


def test_training_of_several_runs():
    axes = plot.training(RECORDS, label="mean")
    again = plot.training(RECORDS, label="upgrad", ax=axes)
    assert again == axes
    assert labels(axes[0]) == ["mean a", "mean b", "upgrad a", "upgrad b"]
    assert labels(axes[1]) == ["mean", "upgrad"]


def test_training_of_many_losses_is_a_range():
    (axis,) = plot.training([{"losses": torch.arange(9.0) + i} for i in range(4)])
    close(torch.as_tensor(axis.lines[0].get_ydata()), [4.0, 5.0, 6.0, 7.0])
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 11)
    assert labels(axis) == ["median"]


ERRORS = {
    "points": lambda: plot.trajectories(torch.zeros(3, 4)),
    "matrix": lambda: plot.cone(torch.eye(3)),
    "gramian": lambda: plot.conflict_matrix(torch.zeros(2, 3)),
    "names": lambda: plot.conflict_matrix(torch.eye(2), ["a"]),
    "records": lambda: plot.training([]),
    "records`.*at 1": lambda: plot.training([{"a": torch.ones(3)}, {"a": torch.ones(2)}]),
    "records`.*at 2": lambda: plot.training([*RECORDS[:2], {"losses": RECORDS[0]["losses"]}]),
    "records`.*'losses', 'a'.*mean over the models": lambda: plot.training(
        [{"losses": {"a": torch.rand(5)}}] * 3
    ),
    r"records`.*\(5, 2\) at 'weights'": lambda: plot.training([{"weights": torch.rand(5, 2)}] * 3),
    r"log` must name some of the quantities .*got \['loss'\]": lambda: plot.training(
        RECORDS, log=["loss"]
    ),
    "log`.*got 'losses'": lambda: plot.training(RECORDS, log="losses"),
    r"units`.*got \['loss'\]": lambda: plot.training(RECORDS, units={"loss": "nats"}),
    "window": lambda: plot.training(RECORDS, window=0),
    "ax": lambda: plot.training(RECORDS, ax=pyplot.subplots()[1]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_fault(name):
    with pytest.raises(ValueError, match=rf"`{name}"):
        ERRORS[name]()


@pytest.mark.parametrize("records", [torch.ones(3, 2), {"losses": torch.ones(3)}, [1.0]])
def test_training_asks_for_a_dict_for_each_step(records):
    with pytest.raises(TypeError, match="`records` must be a list of dicts"):
        plot.training(records)


def test_training_asks_for_numbers():
    with pytest.raises(TypeError, match="`records` must hold numbers, got str at 'phase'"):
        plot.training([{"phase": "warm-up"}])


def test_cone_asks_for_directions_by_name():
    with pytest.raises(TypeError, match="`directions` must be a dict by name, got a tensor"):
        plot.cone(torch.eye(2), torch.ones(2))


def test_front_fills_what_is_not_dominated():
    points = double(1, 4, 2, 2, 4, 1, 3, 3).reshape(4, 2)
    axis = plot.front(points, [5.0, 5.0], label="ours", names=["a", "b"])
    filled, hollow = axis.collections
    assert filled.get_offsets().tolist() == [[1, 4], [2, 2], [4, 1]]
    assert hollow.get_offsets().tolist() == [[3, 3]]
    assert labels(axis) == ["ours, hypervolume 11"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("a", "b")


def test_front_of_three_losses_draws_a_line_for_each_model():
    losses = {name: torch.tensor([1.0, 2.0]) + i for i, name in enumerate("xyz")}
    axis = plot.front(losses)
    assert [line.get_alpha() for line in axis.lines] == [0.9, 0.2]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["x", "y", "z"]


@pytest.mark.parametrize("losses", [torch.ones(3), torch.ones(3, 1), torch.ones(2, 2, 2)])
def test_front_asks_for_a_row_for_each_model(losses):
    with pytest.raises(ValueError, match=r"`losses` must have shape \(k, m\)"):
        plot.front(losses)
