"""How far our numbers may be from the reference's, which are float32; as suggested by those who recorded them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Tolerance:
    """Every element may be off by ``absolute``, or by ``relative`` times the expected tensor's largest magnitude."""

    absolute: float = 0.0
    relative: float = 0.0

    def check(self, actual: ArrayLike, expected: ArrayLike, what: str = "") -> None:
        """Fail where shapes differ or a value is off; ``what`` says what was compared. Equal infinities are equal."""
        ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
        assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        largest = float(theirs.nan_to_num(posinf=0, neginf=0).abs().max())
        allowed = max(self.absolute, self.relative * largest)
        worst = float((ours - theirs).abs().masked_fill(ours == theirs, 0).max())
        assert worst <= allowed, f"{what}: off by {worst:.3g}, allowed {allowed:.3g}"


TABLE = Tolerance(relative=1e-6)
FORWARD = Tolerance(relative=1e-6, absolute=1e-6)
SAMPLE = Tolerance(relative=1e-5, absolute=1e-5)
LOG_PROB = Tolerance(absolute=1e-4)
LOSS = Tolerance(relative=1e-5, absolute=1e-5)
GRADIENT = Tolerance(relative=1e-4, absolute=1e-9)
EXACT = Tolerance()
FLOAT64 = Tolerance(relative=1e-12)


def log_densities(x: ArrayLike, expected: ArrayLike, std: float) -> Tolerance:
    """Of normal densities at ``x``: LOG_PROB, or, where x is large, what 4 roundings of it change: z dx / std."""
    dx = 2.0**-22 * float(torch.as_tensor(x).abs().max())
    z = (2 * float(torch.as_tensor(expected).abs().max())) ** 0.5
    return Tolerance(absolute=max(LOG_PROB.absolute, z * dx / std))


def weights_after_training(sensitivity: float) -> Tolerance:
    """``sensitivity``: how far this parameter ended up when the initial weights were disturbed by 1e-6 N(0, 1)."""
    return Tolerance(absolute=max(1e-5, 10 * sensitivity))
