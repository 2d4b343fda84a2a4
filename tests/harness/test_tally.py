"""Means of losses, and the first step at which one was not finite."""
import pytest
import torch

from harness.tally import Tally


def add(tally, step, **losses):
    tally.step.fill_(step)
    tally.add({name: torch.tensor(value, requires_grad=True) for name, value in losses.items()})


def test_means_are_of_the_steps_since_the_last_restart():
    tally = Tally("cpu")
    add(tally, 0, loss=7., part=1.)
    tally.restart()
    for step, (loss, part) in enumerate([(1., 4.), (2., 5.), (6., 9.)]):
        add(tally, step, loss=loss, part=part)
    add(tally, 2, other=3.)
    assert tally.means() == pytest.approx({"loss": 3., "part": 6., "other": 3.})


def test_the_first_step_that_is_not_finite_is_named_with_its_losses():
    tally = Tally("cpu")
    assert tally.first_bad() is None
    add(tally, 0, loss=1., part=1., rest=1.)
    add(tally, 1, other=1.)
    assert tally.first_bad() is None
    add(tally, 5, loss=float("inf"), part=1., rest=float("nan"))
    add(tally, 6, loss=float("nan"), part=float("nan"), rest=1.)
    add(tally, 7, other=float("nan"))
    tally.restart()
    assert tally.first_bad() == (5, ["loss", "rest"])


def test_tensors_stay_where_they_are_so_that_a_graph_may_hold_them():
    tally = Tally("cpu")
    add(tally, 0, loss=1.)
    kept = tally._kept["loss",]
    places = [part.data_ptr() for part in kept]
    add(tally, 1, loss=2.)
    tally.restart()
    assert tally._kept["loss",] is kept and [part.data_ptr() for part in kept] == places
