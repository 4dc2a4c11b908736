"""The competitors: each says what one task costs it; the loop over tasks is the same for all.

Every one is written as its documentation shows it.  A library is imported where it is used, so that
one that is not there fails alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bench.cases import Case, Job

# From the support set x, y and the query set to the loss on the query set, and to the tensors by
# which it has to be differentiated: one for each parameter of the network, in the same order.
Task = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def autograd(case: Case, net: nn.Module) -> Task:
    """Plain `torch.autograd.grad`, with a graph through the inner steps unless first order is asked for."""
    if case.method == "prototypes":
        return nearest_mean(case, net)
    theta = dict(net.named_parameters())

    def task(x: Tensor, y: Tensor, query: Tensor, answers: Tensor) -> tuple[Tensor, list[Tensor]]:
        phi = theta
        for _ in range(case.steps):
            loss = cross_entropy(functional_call(net, phi, (x,)), y)
            second = case.method == "maml"
            g = torch.autograd.grad(loss, list(phi.values()), create_graph=second)
            phi = {k: p - case.rate * d for (k, p), d in zip(phi.items(), g, strict=True)}
        return cross_entropy(functional_call(net, phi, (query,)), answers), list(theta.values())

    return task


def nearest_mean(case: Case, net: nn.Module) -> Task:
    """Prototypical networks, with the distances of Snell et al.'s own code."""
    leaves = list(net.parameters())

    def task(x: Tensor, y: Tensor, query: Tensor, answers: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = net(x)
        c = torch.stack([z[y == k].mean(0) for k in range(case.way)])
        distances = (net(query)[:, None] - c).square().sum(-1)
        return cross_entropy(-distances, answers), leaves

    return task


def needs_inner_loop(case: Case, library: str) -> None:
    """Raise `NotImplementedError` where a library that differentiates inner loops finds none."""
    if case.method == "prototypes":
        raise NotImplementedError(
            f"no inner loop for {library} to differentiate: its users write the plain loop"
        )


def higher(case: Case, net: nn.Module) -> Task:
    """`higher.innerloop_ctx`; in first order by the gradient at the adapted weights, as it tracks no other."""
    import higher as library

    needs_inner_loop(case, "higher")
    second, inner = case.method == "maml", torch.optim.SGD(net.parameters(), case.rate)
    options = {"copy_initial_weights": False, "track_higher_grads": second}

    def task(x: Tensor, y: Tensor, query: Tensor, answers: Tensor) -> tuple[Tensor, list[Tensor]]:
        with library.innerloop_ctx(net, inner, **options) as (adapted, optimizer):
            for _ in range(case.steps):
                optimizer.step(cross_entropy(adapted(x), y))
            loss = cross_entropy(adapted(query), answers)
        return loss, list(net.parameters() if second else adapted.parameters())

    return task


def torchopt(case: Case, net: nn.Module) -> Task:
    """`torchopt.MetaSGD`, which always keeps the graph; in first order `torchopt.sgd`, its functional form."""
    import torchopt as library

    needs_inner_loop(case, "torchopt")
    if case.method == "first-order":
        return torchopt_functional(case, net)
    leaves, inner = list(net.parameters()), library.MetaSGD(net, case.rate)
    start = [library.extract_state_dict(thing, by="reference") for thing in (net, inner)]

    def task(x: Tensor, y: Tensor, query: Tensor, answers: Tensor) -> tuple[Tensor, list[Tensor]]:
        for _ in range(case.steps):
            inner.step(cross_entropy(net(x), y))
        loss = cross_entropy(net(query), answers)
        for thing, state in zip((net, inner), start, strict=True):
            library.recover_state_dict(thing, state)
        return loss, leaves

    return task


def torchopt_functional(case: Case, net: nn.Module) -> Task:
    """First order with torchopt: gradients without a graph, then `update` and `apply_updates`."""
    import torchopt as library

    names, theta = zip(*net.named_parameters(), strict=True)
    inner = library.sgd(case.rate)

    def forward(phi: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, phi, strict=True)), (x,))

    def task(x: Tensor, y: Tensor, query: Tensor, answers: Tensor) -> tuple[Tensor, list[Tensor]]:
        phi, state = theta, inner.init(theta)
        for _ in range(case.steps):
            g = torch.autograd.grad(cross_entropy(forward(phi, x), y), phi)
            updates, state = inner.update(g, state, inplace=False)
            phi = library.apply_updates(phi, updates, inplace=False)
        return cross_entropy(forward(phi, query), answers), list(theta)

    return task


def learn2learn(case: Case, net: nn.Module) -> Task:
    """`learn2learn.algorithms.MAML`, which clones the network for each task."""
    try:
        from learn2learn.algorithms import MAML
    except ImportError as error:
        raise ImportError(
            f"cannot be imported ({error}); version 0.2.0 does not build on Python 3.11"
        ) from error

    needs_inner_loop(case, "learn2learn")
    maml = MAML(net, lr=case.rate, first_order=case.method == "first-order")

    def task(x: Tensor, y: Tensor, query: Tensor, answers: Tensor) -> tuple[Tensor, list[Tensor]]:
        adapted = maml.clone()
        for _ in range(case.steps):
            adapted.adapt(cross_entropy(adapted(x), y))
        return cross_entropy(adapted(query), answers), list(net.parameters())

    return task


PEERS: dict[str, Callable[[Case, nn.Module], Task]] = {
    "autograd": autograd,
    "higher": higher,
    "torchopt": torchopt,
    "learn2learn": learn2learn,
}


def looped(
    peer: Callable[[Case, nn.Module], Task],  # one of `PEERS`
    job: Job,
) -> Callable[[], None]:
    """A meta-gradient of all tasks, one after the other, left in `.grad` of the network's parameters."""
    net, sides = job.plain, job.episodes
    task, parameters = peer(job.case, net), list(net.parameters())
    labels = [side.y.argmax(-1) for side in sides]
    tasks = list(zip(sides.support.x, labels[0], sides.query.x, labels[1], strict=True))
    set_matmul(job.precision)

    def step() -> None:
        for p in parameters:
            p.grad = None
        for examples in tasks:
            with autocast(job):
                loss, leaves = task(*examples)
            for p, g in zip(
                parameters, torch.autograd.grad(loss / len(tasks), leaves), strict=True
            ):
                p.grad = g if p.grad is None else p.grad.add_(g)

    return step


def autocast(job: Job) -> AbstractContextManager:
    """In bfloat16 what `torch.autocast` thinks fit, else nothing."""
    if job.precision != "bfloat16":
        return nullcontext()
    return torch.autocast(job.device, dtype=torch.bfloat16)


def set_matmul(precision: str) -> None:
    """Let a GPU round the factors of float32 products to TF32, or forbid it."""
    rounded = precision in ("tf32", "bfloat16")  # there: what autocast leaves in float32
    torch.backends.cuda.matmul.allow_tf32 = rounded
    torch.backends.cudnn.allow_tf32 = rounded
