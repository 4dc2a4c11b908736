"""Made from nbs/01_learning_to_learn.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

import math

import torch


def test_the_smallest_meta_learner():
    # cell d7a6fe31
    generator = torch.Generator().manual_seed(0)
    mu = 3.0 + 1.0 * torch.randn(200_000, generator=generator)  # m = 3, tau = 1
    x = mu + 2.0 * torch.randn(200_000, generator=generator)  # sigma = 2: one reading of each task

    theta = torch.tensor([0.0, 0.5], requires_grad=True)  # m and w, to be learned
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for batch in torch.arange(200_000).split(1000):  # the outer loop
        m, w = theta
        prediction = m + w * (x[batch] - m)  # the inner loop: adapt to one example
        loss = (prediction - mu[batch]).square().mean()  # judged on the query
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    m, w = theta.tolist()
    error = (m + w * (x - m) - mu).square().mean().item()
    print(f"learned: m = {m:.2f}, w = {w:.2f} (exact 3 and 0.2); error {error:.2f} (exact 0.8)")
    assert abs(m - 3) < 0.15 and abs(w - 0.2) < 0.03 and abs(error - 0.8) < 0.02
    assert abs((x - mu).square().mean().item() - 4) < 0.1  # learning each task alone
    assert abs((3 - mu).square().mean().item() - 1) < 0.02  # one answer for all tasks


def test_when_meta_learning_saves_little():
    # cell fcd09a83
    # error / sigma^2 = tau^2 / (tau^2 + sigma^2) > 0.9, so sigma^2 < 1/9 with tau^2 = 1.
    error = lambda sigma2: sigma2 / (1 + sigma2)  # noqa: E731
    assert math.isclose(error(1 / 9) / (1 / 9), 0.9)
    assert error(0.1) / 0.1 > 0.9 > error(0.12) / 0.12  # smaller noise saves less


def test_several_readings():
    # cell a6b20b30
    # The mean of K readings is one reading with noise variance sigma^2 / K: put that into w*.
    K, sigma2, tau2 = 4, 4.0, 1.0
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(200_000, generator=generator)
    mean = mu + math.sqrt(sigma2 / K) * torch.randn(200_000, generator=generator)
    best = (mean * mu).mean() / mean.square().mean()  # least squares weight, for m = 0
    assert abs(best.item() - tau2 / (tau2 + sigma2 / K)) < 0.01
