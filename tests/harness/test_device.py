"""A step in one launch, its graph stood in for: what a capture would freeze, and what happens where it cannot be."""
import pytest
import torch
import torch.nn.functional as F
from recording import Recording
from torch import nn

from harness import device
from harness.device import GraphedStep


class Steps:
    """A small network with all that changes from step to step: rate, statistics, what is drawn."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=torch.tensor(0.), fused=True)
        self.settled = True

    def step(self, x, wide=False):
        loss = F.mse_loss(self.model(x), x[:, :2]) * (10. if wide else 1.)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.detach()}

    def graphed(self, **how):
        return GraphedStep(self.step, (self.optimizer,), lambda: self.settled, Recording(**how))


def train(steps, step, batches):
    """Losses of the batches, and the weights and the state of the optimizer after them."""
    losses = []
    for number, inputs in enumerate(batches):
        device.set_lr(steps.optimizer, 0.01 / (1 + number))
        losses.append(float(step(*inputs)["loss"]))
    state = steps.optimizer.state_dict()["state"]
    return losses, [*steps.model.state_dict().values(), *(part for one in state.values() for part in one.values())]


def batches(sizes, wide=()):
    torch.manual_seed(1)
    return [(torch.randn(size, 4), number in wide) for number, size in enumerate(sizes)]


def same(one, two):
    return one[0] == two[0] and all(map(torch.equal, one[1], two[1]))


CASES = {"alike": batches([8] * 20), "a smaller one among them": batches([8] * 9 + [5] + [8] * 10),
         "the first is smaller": batches([5] + [8] * 12), "a part starts": batches([8] * 20, wide=range(10, 20)),
         "every third is of another kind": batches([8] * 20, wide=range(2, 20, 3))}
CAPTURES = {"a part starts": 2, "every third is of another kind": 2}


@pytest.mark.parametrize("case", CASES)
def test_a_graphed_run_equals_an_eager_one_to_the_bit(case):
    runs = []
    for graphed in (False, True):
        steps = Steps()
        step = steps.graphed() if graphed else steps.step
        torch.manual_seed(2)
        runs.append(train(steps, step, CASES[case]))
    assert same(*runs)
    assert step.graphs.captures == CAPTURES.get(case, 1) and step.graphs.replays >= 6


def test_a_number_that_changes_is_frozen_by_the_stand_in():
    """What the tests above would otherwise not see."""
    runs = []
    for graphed in (False, True):
        steps = Steps()
        steps.optimizer.param_groups[0]["lr"] = 0.  # a plain number
        step = steps.graphed() if graphed else steps.step
        torch.manual_seed(2)
        runs.append(train(steps, step, CASES["alike"]))
    assert not same(*runs)


def test_nothing_is_captured_before_it_is_ready(capsys):
    steps = Steps()
    step, (x, _), steps.settled = steps.graphed(), CASES["alike"][0], False
    for _ in range(6):
        step(x)
    assert not step.graphs.captures
    steps.settled = True
    for _ in range(device.WARM_UP + 1):
        step(x)
    assert step.graphs.captures == 1 and "captured in" in capsys.readouterr().out


def test_a_step_that_cannot_be_captured_is_one_line_and_goes_on(capsys):
    runs = []
    for graphed in (False, True):
        steps = Steps()
        step = steps.graphed(fails="operation not permitted\nwhen capturing") if graphed else steps.step
        torch.manual_seed(2)
        runs.append(train(steps, step, CASES["alike"]))
    assert same(*runs)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no CUDA graph: operation not permitted" in out


def test_a_step_that_waits_for_the_device_is_not_captured(capsys):
    steps = Steps()
    step = GraphedStep(lambda x: {"loss": torch.tensor(x.sum().item())}, (), lambda: True, Recording())
    for x, _ in CASES["alike"]:
        assert step(x)["loss"] == x.sum()
    assert "waits" in capsys.readouterr().out and steps


@pytest.mark.parametrize("how, line", [({}, ""), ({"graph": False}, ""), ({"accumulate": 2}, "--accumulate 2")])
def test_a_step_stays_as_it_is_where_no_graph_fits(capsys, how, line):
    where = torch.device("cuda" if line or how else "cpu")
    steps = Steps()
    assert device.one_step(steps.step, where, steps.optimizer, **how) == steps.step
    out = capsys.readouterr().out
    assert line in out and out.count("\n") == bool(line)
