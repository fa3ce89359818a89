"""Functions keep PyTorch's manners: layouts, threads, processes, streams, devices."""

import multiprocessing
import threading

import pytest
import torch

import triton_deq as td

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ONE_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SOLVERS = [td.Anderson(), td.Broyden(), td.Picard()]


def contraction(x: torch.Tensor):
    return lambda z: torch.tanh(0.5 * z + x)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_channels_last_stays_channels_last(solver):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    seen = []

    def f(z):
        seen.append(z.is_contiguous(memory_format=torch.channels_last))
        return contraction(x)(z)

    solution = td.solve(f, torch.zeros_like(x), solver, backend="reference")
    assert solution.value.is_contiguous(memory_format=torch.channels_last)
    assert all(seen)


def test_threads_do_not_mix():
    """Each solves with a backend of its own, which its cell asks for."""
    deqs = [td.DEQ(td.MLPCell(8, 3), backend=backend) for backend in ("reference", "auto") * 2]
    inputs = [torch.randn(4, 3) for _ in deqs]
    wanted = [deq(x).value.detach() for deq, x in zip(deqs, inputs, strict=True)]
    found = [[] for _ in deqs]

    def work(place):
        for _ in range(10):
            value = deqs[place](inputs[place]).value
            value.square().mean().backward()
            found[place].append(value.detach())

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(deqs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for values, value in zip(found, wanted, strict=True):
        assert len(values) == 10
        assert all(torch.equal(each, value) for each in values)


def _solve_in_a_process(queue):
    torch.set_num_threads(1)
    x = torch.ones(2, 3)
    queue.put(td.solve(contraction(x), torch.zeros(2, 3), backend="reference").value.sum().item())


def test_a_forked_process_can_solve():
    """As a data loader's worker may."""
    x = torch.ones(2, 3)
    wanted = td.solve(contraction(x), torch.zeros(2, 3), backend="reference").value.sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_solve_in_a_process, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == pytest.approx(wanted)
    process.join()


def test_a_default_device_that_is_not_the_state_s():
    """What a solve keeps lies where its state is, whatever tensors are made on by default."""
    x = torch.randn(2, 3, device="cpu")
    torch.set_default_device("meta")
    try:
        solutions = [
            td.solve(contraction(x), torch.zeros_like(x), solver, backend="reference") for solver in SOLVERS
        ]
    finally:
        torch.set_default_device(None)
    for solution in solutions:
        assert solution.value.device == solution.residual.device == x.device
        assert solution.converged.all()


def test_no_operator_is_registered():
    """Kernels are launched by autograd functions; where a tracer looks on, PyTorch's operators run. So there
    is nothing that torch.library.opcheck could be asked about; a registered operator belongs here."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("triton_deq")]
    assert names == []


@ONE_GPU
@pytest.mark.kernels
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_stream_of_one_s_own(solver):
    """Work waits for what the stream holds, and is done when the stream is."""
    x = torch.randn(64, 4096, device="cuda")
    wanted = td.solve(contraction(x), torch.zeros_like(x), solver, check_every=4).value
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        later = torch.zeros_like(x)
        later.copy_(x)
        found = td.solve(contraction(later), torch.zeros_like(later), solver, check_every=4).value
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, wanted)


@ONE_GPU
@pytest.mark.kernels
def test_a_training_step_on_a_stream_of_one_s_own():
    deq = td.DEQ(td.MLPCell(64, 8), penalty=td.JacobianPenalty(0.0)).cuda()
    x = torch.randn(32, 8, device="cuda")

    def step():
        out = deq(x)
        return torch.autograd.grad(out.value.square().mean(), list(deq.parameters()))

    wanted = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step()
    torch.cuda.current_stream().wait_stream(stream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@TWO_GPUS
@pytest.mark.kernels
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_another_device_than_the_current_one(solver):
    torch.cuda.set_device(0)
    values = []
    for device in ("cuda:1", "cuda:0"):
        x = torch.linspace(-1, 1, 3 * 500, device=device).view(3, 500)
        solution = td.solve(contraction(x), torch.zeros_like(x), solver)
        assert solution.value.device == solution.residual.device == torch.device(device)
        values.append(solution.value.cpu())
    assert torch.equal(*values)
    deq = td.DEQ(td.MLPCell(16, 4)).to("cuda:1")
    deq(torch.randn(8, 4, device="cuda:1")).value.sum().backward()
    assert deq.cell.state.weight.grad.device == torch.device("cuda:1")
