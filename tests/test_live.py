"""Bytes of tensors that come and go."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from live import Live, nbytes, passing, trained

KB = 1000  # bytes of 250 numbers


def test_a_tensor_counts_from_its_making_to_its_end():
    with Live() as live:
        a = torch.zeros(250)
        assert (live.now, live.peak) == (KB, KB)
        b = a * 2
        assert live.now == 2 * KB
        del b
        assert (live.now, live.peak) == (KB, 2 * KB)
        c = torch.ones(500)
        assert (live.now, live.peak) == (3 * KB, 3 * KB)
    del c, a
    assert live.now == 0


def test_views_and_writing_into_a_tensor_make_nothing():
    a = torch.zeros(250)
    with Live() as live:
        a.view(25, 10).mT.add_(1.0)
        a.chunk(2)[0].zero_()
        torch.exp(a, out=a)
    assert live.peak == 0


def test_a_result_in_half_precision_counts_half():
    a = torch.zeros(250)
    with Live() as live:
        b = a.bfloat16()
    assert live.now == nbytes(b) == KB // 2


def test_nbytes_is_that_of_the_memory_behind_a_view():
    a = torch.zeros(250)
    assert nbytes(a[:10]) == KB and nbytes(a, a.double()) == 3 * KB


def test_what_a_backward_pass_needs_is_kept():
    """sin keeps its input, exp its result; what was there before is not counted."""
    assert trained(torch.sin, torch.zeros(250)) == (KB, 3 * KB)  # beyond: dL/dy, cos x, dL/dx
    assert trained(lambda x: x.sin().exp(), torch.zeros(250))[0] == KB
    assert trained(lambda x: x.exp().sin().exp(), torch.zeros(250))[0] == 2 * KB
    assert trained(lambda x: x.exp().sin().sin().exp(), torch.zeros(250))[0] == 3 * KB


def test_the_tensors_of_a_moment_are_not_kept():
    kept, extra = trained(lambda x: (x + 1).expand(4, 250).exp().sum(0), torch.zeros(250))
    assert kept == 4 * KB + KB  # exp's result, and the sum
    assert extra >= 4 * KB + KB  # the gradients of both


def test_gradients_are_counted_of_the_input_and_of_what_is_named():
    w = torch.zeros(250, 250, requires_grad=True)

    def product(x):
        return x @ w

    x = torch.zeros(1, 250)
    alone, beside = trained(product, x), trained(product, x, also=(w,))
    assert alone[0] == beside[0] == KB
    assert beside[1] == alone[1] + 250 * KB


def test_recomputed_is_as_a_checkpoint_does_it():
    def run(x):
        return x.exp().exp().exp()

    x = torch.zeros(250, requires_grad=True)
    kept, extra = trained(run, x, recompute=True)
    with Live() as live:
        y = checkpoint(run, x, use_reentrant=False)
        assert live.now == kept == KB
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert abs(live.peak - kept - extra) <= KB


def test_without_gradient_only_the_worst_moment_counts():
    assert passing(lambda x: x.exp().exp().exp(), torch.zeros(250)) == 2 * KB
    assert passing(lambda x, y: x + y, torch.zeros(250), torch.zeros(250, requires_grad=True)) == KB


def test_fake_tensors_of_any_size_count_as_real_ones_of_that_size_would():
    def measured(n: int):
        net = nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n), nn.Softmax(-1))
        x = torch.empty(3 * n, n)
        with torch.autocast("cpu", torch.bfloat16):
            return trained(net, x), passing(net, x)

    with FakeTensorMode():
        fake, huge = measured(64), measured(64_000)
    assert fake == measured(64)
    assert huge[0][0] > 0.9 * 1e6 * fake[0][0]  # terabytes
