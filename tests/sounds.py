"""What the tests of augment.py listen to, and how they measure it."""

import math

import torch

RATE = 22050
SAMPLES = 59049


def music(batch, samples=SAMPLES, seed=0):
    """(B, 1, T): decaying harmonic notes over a little noise, different in every row."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(samples) / RATE
    base = 80 + 400 * torch.rand(batch, 1, generator=generator)
    sound = sum(torch.sin(2 * math.pi * base * h * t) / h for h in range(1, 12))
    sound = sound * torch.exp(-6 * (t * (1 + torch.rand(batch, 1, generator=generator)) % 0.5))
    noise = torch.randn(batch, samples, generator=generator)
    return (0.1 * sound + 0.005 * noise)[:, None]


def white(batch, samples, seed=0):
    """(B, 1, T) of white noise."""
    return torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def full(value, batch=1):
    """The same value for every example."""
    return torch.full((batch,), float(value))


def decibels(x):
    """The level of a sound."""
    return 20 * math.log10(float(x.double().square().mean().sqrt()) + 1e-30)
