"""Made from nbs/01_learning_to_learn.ipynb by tools/cells_to_tests.py. Edit the notebook, not this file."""

import math

import torch


def test_the_smallest_meta_learner():
    # cell d7a6fe31
    generator = torch.Generator().manual_seed(0)
    mu = 3.0 + 1.0 * torch.randn(200_000, generator=generator)  # nu = 3, s = 1
    x = mu + 2.0 * torch.randn(200_000, generator=generator)  # sigma = 2: one reading of each task

    theta = torch.tensor([0.0, 0.5], requires_grad=True)  # nu and omega, to be learned
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for batch in torch.arange(200_000).split(1000):  # the outer loop
        nu, omega = theta
        prediction = nu + omega * (x[batch] - nu)  # the inner loop: adapt to one example
        loss = (prediction - mu[batch]).square().mean()  # judged on the query
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    nu, omega = theta.tolist()
    error = (nu + omega * (x - nu) - mu).square().mean().item()
    print(
        f"learned: nu = {nu:.2f}, omega = {omega:.2f} (exact 3 and 0.2); error {error:.2f} (exact 0.8)"
    )
    assert abs(nu - 3) < 0.15 and abs(omega - 0.2) < 0.03 and abs(error - 0.8) < 0.02
    assert abs((x - mu).square().mean().item() - 4) < 0.1  # learning each task alone
    assert abs((3 - mu).square().mean().item() - 1) < 0.02  # one answer for all tasks


def test_few_steps_are_little_trust():
    # cell 703a7766
    nu, x, alpha = torch.tensor(3.0, dtype=torch.float64), torch.tensor([5.0, -1.0]).double(), 0.3
    phi = nu.expand(2).clone().requires_grad_()
    for t in range(1, 6):
        (g,) = torch.autograd.grad((0.5 * (phi - x) ** 2).sum(), phi)
        phi = (phi - alpha * g).detach().requires_grad_()
        torch.testing.assert_close(phi.detach(), nu + (1 - (1 - alpha) ** t) * (x - nu))

    error = lambda omega, readings: omega**2 * 4 / readings + (1 - omega) ** 2  # noqa: E731  (s = 1)
    assert round(error(0.2, 1), 2) == 0.8 and round(error(0.2, 100), 2) == 0.64
    assert (
        error(1.0, 100) == 0.04 and error(1.0, 1) == 4
    )  # to the end: right for many readings only


def test_when_meta_learning_saves_little():
    # cell fcd09a83
    # error / sigma^2 = s^2 / (s^2 + sigma^2) > 0.9, so sigma^2 < 1/9 with s^2 = 1.
    error = lambda sigma2: sigma2 / (1 + sigma2)  # noqa: E731
    assert math.isclose(error(1 / 9) / (1 / 9), 0.9)
    assert error(0.1) / 0.1 > 0.9 > error(0.12) / 0.12  # smaller noise saves less


def test_several_readings():
    # cell a6b20b30
    # The mean of K readings is mu plus the mean of K noises, whose variance is sigma^2 / K: put that into omega*.
    K, sigma2, s2 = 4, 4.0, 1.0
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(200_000, generator=generator)  # nu = 0
    readings = mu[:, None] + math.sqrt(sigma2) * torch.randn(200_000, K, generator=generator)
    mean = readings.mean(1)
    best = (mean * mu).mean() / mean.square().mean()  # least squares weight, for nu = 0
    assert abs(best.item() - s2 / (s2 + sigma2 / K)) < 0.01
    assert abs((best * mean - mu).square().mean().item() - 0.5) < 0.01  # the error: 1 * 1 / (1 + 1)
