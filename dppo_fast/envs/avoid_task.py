"""D3IL avoid (Jia et al. 2024, arXiv 2402.14606), what its simulators share: the table, the arm's tracking, the rules.

An arm pushes a rod over a table, from ``START`` through three lines of obstacles, each of which can be passed on
several sides: 2 * 3 * 4 = 24 modes. An action [2] moves the desired position of the rod, in metres; the rod follows
with a lag. Only one mode leads to the full reward. Positions are (x, y) in metres, the arm's axis stands at (0, 0).
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

START = (0.525, -0.28)
ROD_RADIUS = 0.01
ROD_HEIGHT = 0.12
OBSTACLES = (
    (0.5, -0.1, 0.03),
    (0.425, 0.08, 0.025),
    (0.575, 0.08, 0.025),
    (0.35, 0.26, 0.025),
    (0.5, 0.26, 0.025),
    (0.65, 0.26, 0.025),
)
"""Cylinders: x, y, radius."""

LINE_Y = (-0.1, 0.08, 0.26)
SIDES = ((0.5,), (0.425, 0.575), (0.35, 0.5, 0.65))
"""Of each line of obstacles, where along x its sides meet. The sides of all lines are numbered from 0 to 8."""
LINE_WIDTH = 0.03
FINISH_Y = 0.35
GOAL_SIDE, GOAL_Y = 5, 0.4
TABLE_X = (0.2, 0.8)
MODES = tuple(product(range(2), range(2, 5), range(5, 9)))
"""The sides that a whole trajectory takes, one per line."""

OBS_DIM = 4
ACTION_LOW, ACTION_HIGH = np.array([-0.0125, 0.0]), np.array([0.0125, 0.0125])
"""What the human demonstrators' actions reach, in metres per control step; actions are not clipped."""

SUBSTEP, SUBSTEPS = 0.001, 35
CONTROL_STEP = SUBSTEP * SUBSTEPS
"""In seconds."""

SWIVEL_INERTIA, CARRIAGE_MASS = 1.05, 5.6
STIFFNESS, DAMPING = (1425.0, 120.0), (181.0, 10.0)
"""Of the PD control along the boom (N/m, N s/m) and of the swivel (N m/rad, N m s/rad).

The arm is a boom that turns about a vertical axis and carries the rod at a variable distance. The swivel's gains are
those of the Panda's first joint; the others, and the masses, are fitted to 96 recorded demonstrations.
"""
REACH, MAX_ANGLE = (0.25, 0.81), 2.8
"""The desired position's distance (m) and angle (rad) are held to what the arm can reach."""


def polar_target(desired: Tensor) -> Tensor:
    """Where the arm is told to go, distance and angle [n, 2], for desired positions [n, 2]."""
    x, y = desired.unbind(-1)
    return torch.stack((torch.hypot(x, y).clamp(*REACH), torch.atan2(y, x).clamp(-MAX_ANGLE, MAX_ANGLE)), -1)


def cartesian(polar: Tensor) -> Tensor:
    """Positions [..., 2] of distances and angles [..., 2]."""
    distance, angle = polar.unbind(-1)
    return torch.stack((distance * angle.cos(), distance * angle.sin()), -1)


def clearance(rod: Tensor) -> Tensor:
    """From the rod at [..., 2] to each obstacle's surface [..., 6]; below 0 inside."""
    x, y = rod.unbind(-1)
    return torch.stack([torch.hypot(x - ox, y - oy) - radius - ROD_RADIUS for ox, oy, radius in OBSTACLES], -1)


def latch_sides(taken: Tensor, rod: Tensor) -> Tensor:
    """``taken`` [n, 9] bool, the sides that were taken before, and those that seeing the rod at [n, 2] adds.

    What counts on a line is the first side on which the rod is seen at most ``LINE_WIDTH`` from it, or past it on the
    last line.
    """
    x, y = rod.unbind(-1)
    seen = [*((y - line).abs() <= LINE_WIDTH for line in LINE_Y[:-1]), y >= LINE_Y[-1]]
    lines: list[Tensor] = []
    for at_line, edges, number in zip(seen, SIDES, (0, 2, 5), strict=True):
        before = taken[:, number : number + len(edges) + 1]
        right_of = [torch.ones_like(at_line), *(x > edge for edge in edges), torch.zeros_like(at_line)]
        side = torch.stack([left & ~right for left, right in pairwise(right_of)], -1)
        lines.append(before | side & (at_line & ~before.any(-1))[:, None])
    return torch.cat(lines, -1)


def reward_of(taken: Tensor, collided: Tensor, rod: Tensor) -> Tensor:
    """[n]: 1 for the goal's side of the last line and 1 beyond ``GOAL_Y``; -0.1 off the table and, for ever, after a
    collision.
    """
    x, y = rod.unbind(-1)
    lost = collided | (x < TABLE_X[0]) | (x > TABLE_X[1])
    progress = taken[:, GOAL_SIDE].to(y.dtype) + (y > GOAL_Y).to(y.dtype)
    return torch.where(lost, -0.1, progress)


def sides_of(path: ArrayLike) -> tuple[int, ...]:
    """The sides that the rod took on its path [L, 2]; one of `MODES` if it passed all lines."""
    taken = torch.zeros(1, 9, dtype=torch.bool)
    for rod in torch.as_tensor(np.asarray(path)):
        taken = latch_sides(taken, rod[None])
    return tuple(taken[0].nonzero()[:, 0].tolist())
