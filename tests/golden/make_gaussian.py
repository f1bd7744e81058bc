"""Golden numbers of DiT's Gaussian process, float64 numpy, for tests/diffusion/test_gaussian.py.

  python tests/golden/make_gaussian.py

Written from the description of the method (arXiv 2102.09672 and 2010.02502; facebookresearch/DiT), one
example and one timestep at a time, with Bayes' rule and the means themselves where ig_jax has tables.
"""

import math
from pathlib import Path

import numpy as np

BETA = np.linspace(1e-4, 0.02, 1000)


def alpha_bar(steps, n):
    """Product of 1 - beta up to timestep steps[n]; 1 before the first."""
    return 1.0 if n < 0 else math.prod(1 - BETA[k] for k in range(steps[n] + 1))


def beta(steps, n):
    return 1 - alpha_bar(steps, n) / alpha_bar(steps, n - 1)


def posterior(steps, n, x, x_n):
    """(mean, variance) of q(x_{n-1} | x_n, x) by Bayes' rule for two Gaussians."""
    b, before = beta(steps, n), alpha_bar(steps, n - 1)
    if n == 0:
        return x, 0.0
    precision = (1 - b) / b + 1 / (1 - before)
    mean = (math.sqrt(1 - b) / b * x_n + math.sqrt(before) / (1 - before) * x) / precision
    return mean, 1 / precision


def log_variance(steps, n, output):
    """Learned range: from the posterior's log variance (of step 1 for step 0) at -1 to log beta at 1."""
    low = math.log(posterior(steps, max(n, 1), 0.0, 0.0)[1])
    return low + 0.5 * (output + 1) * (math.log(beta(steps, n)) - low)


def denoised(steps, n, x_n, eps, clip=False):
    a = alpha_bar(steps, n)
    x = (x_n - math.sqrt(1 - a) * eps) / math.sqrt(a)
    return np.clip(x, -1, 1) if clip else x


def cdf(x):
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bound(n, x, eps, predicted, output):
    """Bits per dimension of the term at timestep n of the full chain."""
    steps = np.arange(1000)
    x_n = math.sqrt(alpha_bar(steps, n)) * x + math.sqrt(1 - alpha_bar(steps, n)) * eps
    mean, _ = posterior(steps, n, denoised(steps, n, x_n, predicted), x_n)
    log_var = log_variance(steps, n, output)
    if n > 0:
        true_mean, true_var = posterior(steps, n, x, x_n)
        ratio = true_var / np.exp(log_var)
        nats = 0.5 * (ratio - 1 - np.log(ratio) + (true_mean - mean) ** 2 / np.exp(log_var))
    else:
        scale = np.exp(0.5 * log_var)
        above, below = cdf((x - mean + 1 / 255) / scale), cdf((x - mean - 1 / 255) / scale)
        mass = np.where(x < -0.999, above, np.where(x > 0.999, 1 - below, above - below))
        nats = -np.log(np.maximum(mass, 1e-12))
    return np.mean(nats) / math.log(2)


def network(x, timestep):
    """A stand-in: (eps, variance output), smooth in both arguments."""
    return 0.8 * x + 0.3 * math.sin(timestep / 150), np.tanh(x + timestep / 500 - 1)


def ddpm(steps, x, noise, clip):
    for n in reversed(range(len(steps))):
        eps, output = network(x, steps[n])
        mean, _ = posterior(steps, n, denoised(steps, n, x, eps, clip), x)
        scale = 0.0 if n == 0 else np.exp(0.5 * log_variance(steps, n, output))
        x = mean + scale * noise[len(steps) - 1 - n]
    return x


def ddim(steps, x, noise, eta, clip):
    for n in reversed(range(len(steps))):
        now, before = alpha_bar(steps, n), alpha_bar(steps, n - 1)
        data = denoised(steps, n, x, network(x, steps[n])[0], clip)
        eps = (x - math.sqrt(now) * data) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
        x = math.sqrt(before) * data + math.sqrt(1 - before - sigma**2) * eps
        x = x if n == 0 else x + sigma * noise[len(steps) - 1 - n]
    return x


def main():
    rng = np.random.default_rng(0)
    t = np.array([0, 0, 1, 2, 250, 500, 998, 999])
    shape = (len(t), 3, 3, 2)
    x, eps = rng.uniform(-1, 1, shape), rng.standard_normal(shape)
    x[0, 0], x[0, 1] = -1.0, 1.0  # the two open ends of the discretised likelihood
    predicted, output = eps + 0.3 * rng.standard_normal(shape), rng.uniform(-1.5, 1.5, shape)
    full, delta = np.arange(1000), 1e-5
    bounds = [bound(*row) for row in zip(t, x, eps, predicted, output)]
    nudge = np.zeros(shape[1:])
    nudge[1, 2, 1] = delta
    slopes = [
        (bound(n, a, b, c, d + nudge) - bound(n, a, b, c, d - nudge)) / (2 * delta)
        for n, a, b, c, d in zip(t, x, eps, predicted, output)
    ]
    steps = np.array([round(999 * i / 9) for i in range(10)])
    start, noise = rng.standard_normal((2, 3, 3, 2)), rng.standard_normal((10, 2, 3, 3, 2))
    x_t = np.stack(
        [math.sqrt(alpha_bar(full, n)) * a + math.sqrt(1 - alpha_bar(full, n)) * b for n, a, b in zip(t, x, eps)]
    )
    np.savez_compressed(
        Path(__file__).with_name("gaussian.npz"),
        t=t,
        x=x,
        eps=eps,
        predicted=predicted,
        output=output,
        x_t=x_t,
        bound=bounds,
        bound_slope=slopes,
        posterior_mean=np.stack([posterior(full, n, a, b)[0] for n, a, b in zip(t, x, x_t)]),
        posterior_variance=[posterior(full, n, 0.0, 0.0)[1] for n in t],
        steps=steps,
        spaced_betas=[beta(steps, n) for n in range(10)],
        start=start,
        noise=noise,
        ddpm=ddpm(steps, start, noise, clip=False),
        ddpm_clip=ddpm(steps, start, noise, clip=True),
        ddim=ddim(steps, start, noise, 0.0, clip=False),
        ddim_eta=ddim(steps, start, noise, 0.5, clip=False),
        ddim_clip=ddim(steps, start, noise, 0.0, clip=True),
    )


if __name__ == "__main__":
    main()
