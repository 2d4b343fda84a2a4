"""A step in one launch, its graph stood in for: what a capture would freeze, and what happens where it cannot be."""
import pytest
import torch
import torch.nn.functional as F
from recording import Recording
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from harness import device
from harness.device import GraphedStep
from harness.errors import UserError


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


@pytest.mark.parametrize("first, case", [(0, "alike"), (1, "a part starts")])
def test_a_step_that_cannot_be_captured_is_one_line_and_goes_on(capsys, first, case):
    runs = []
    for graphed in (False, True):
        steps = Steps()
        step = steps.graphed(fails="operation not permitted\nwhen capturing", first=first) if graphed else steps.step
        torch.manual_seed(2)
        runs.append(train(steps, step, CASES[case]))
    assert same(*runs)
    *captured, failed = capsys.readouterr().out.splitlines()
    assert failed == "the step is no CUDA graph: operation not permitted" and len(captured) == first
    assert step.captured == {}


class Full(Steps):
    """A step whose other part finds no memory until a step has failed for want of it."""

    def __init__(self):
        super().__init__()
        self.full = True

    def step(self, x, wide=False):
        if wide and self.full:
            self.full = False
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(x, wide)


def test_a_plain_step_that_finds_no_memory_beside_the_graphs_goes_on_without_them(capsys):
    runs, steps = [], (Steps(), Full())
    for one, step in zip(steps, (steps[0].step, steps[1].graphed())):
        torch.manual_seed(2)
        runs.append(train(one, step, CASES["a part starts"]))
    assert same(*runs) and step.captured == {} and step.graphs.captures == 1 and step.graphs.replays
    assert capsys.readouterr().out.splitlines()[-1] == "the step is no CUDA graph: CUDA out of memory"
    with pytest.raises(torch.OutOfMemoryError):  # where there is no graph to give up
        Full().graphed()(torch.randn(8, 4), True)


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


# --- compiled functions, the compiler stood in for

@pytest.fixture
def compiler(monkeypatch):
    """How the compiler is to behave: the backend, and numbers of calls that fail; and what it compiled."""
    how, real = {"backend": "eager", "fails": (), "compiled": []}, torch.compile

    def stand_in(function, **settings):
        fast = real(function, backend=how["backend"], **settings)

        def call(*inputs):
            how["compiled"].append(inputs)
            if len(how["compiled"]) in how["fails"]:
                raise RuntimeError("an empty file\nin the cache")
            return fast(*inputs)
        return call
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", stand_in)
    return how


def loss_of(model):
    def function(x, apart=False):
        loss = model(x).square().mean()
        return (loss, loss.detach()) if apart else loss
    return function


def test_a_compiled_function_computes_the_same_and_can_be_differentiated_twice(compiler):
    compiler["backend"] = "aot_eager"
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()), torch.randn(2, 3, 8, 8)
    fast, plain = device.compiled(loss_of(model)), loss_of(model)
    expected, = torch.autograd.grad(plain(x), model[0].weight)
    for _ in range(3):
        loss = fast(x)
        first, = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        loss.backward()
        torch.testing.assert_close([loss, first, model[0].weight.grad], [plain(x), expected, expected])
        model.zero_grad()
    assert len(compiler["compiled"]) == 2


@pytest.mark.parametrize("fails", [1, 3])
def test_a_compiler_that_fails_at_any_call_is_one_line_and_the_function_works(compiler, capsys, fails):
    compiler["fails"] = [fails]
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    fast = device.compiled(loss_of(model))
    for _ in range(5):
        assert torch.equal(fast(x), loss_of(model)(x))
    failed = [line for line in capsys.readouterr().out.splitlines() if "compiled in" not in line]
    assert failed == ["--compile failed here and is left out: an empty file"] and len(compiler["compiled"]) == fails


def test_a_backward_that_does_not_compile_fails_before_anything_has_changed(compiler, capsys):
    def fail(graph, inputs):
        raise RuntimeError("no C++ compiler")
    compiler["backend"] = aot_autograd(fw_compiler=make_boxed_func_of, bw_compiler=fail)
    model, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    fast = device.compiled(loss_of(model))
    fast(x)
    fast(x).backward()
    assert model.num_batches_tracked == 2 and model.weight.grad is not None
    assert "no C++ compiler" in capsys.readouterr().out


def make_boxed_func_of(graph, inputs):
    return make_boxed_func(graph.forward)


def test_an_error_of_the_function_s_own_is_raised(compiler, capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        device.compiled(loss_of(nn.Linear(3, 3)))(torch.randn(2, 5))
    assert not capsys.readouterr().out


def test_what_is_not_as_the_first_batch_is_not_compiled(compiler):
    settled = []
    fast, x = device.compiled(loss_of(nn.Linear(3, 3)), lambda: bool(settled)), torch.randn(4, 3)
    fast(x)
    settled.append(True)
    assert not compiler["compiled"]
    for inputs in ((x[:3],), (x,), (x, True), (x,), (x[:3],), (x,)):  # a rare shape may be the first
        fast(*inputs)
    assert compiler["compiled"] == [(x,), (x,)]


def test_a_run_goes_on_with_an_optimizer_of_another_device():
    """Saved where the learning rate is a tensor, restored where it is a number."""
    weight = nn.Parameter(torch.ones(2))
    there = torch.optim.Adam([weight], lr=torch.tensor(0.5), capturable=False, fused=True)
    weight.sum().backward()
    there.step()
    here = device.adam([weight], 0.1)
    here.load_state_dict(there.state_dict())
    assert here.param_groups[0]["lr"] == 0.1 and not torch.is_tensor(here.param_groups[0]["lr"])
    assert here.state[weight]["step"] == 1
    device.set_lr(here, 0.2)
    assert here.param_groups[0]["lr"] == 0.2
    assert there.param_groups[0]["lr"] == 0.5


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("harness.distributed.local_world_size", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:0 is one GPU for several processes: leave its number out"):
        device.pick_device("cuda:0")
