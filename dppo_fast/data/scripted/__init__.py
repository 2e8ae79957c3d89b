"""Scripted demonstrators, which ``python -m dppo_fast.collect scripted=<name>`` records.

One is a class (`Demonstrator`) in a module of this package and a line in `SCRIPTED`. Its constructor takes ``num_envs``
and ``seed``; what else it takes is set with ``options.<name>=<value>``. Its ``env`` holds the environment's keys, which
``env.<key>=<value>`` changes. It sees states and gives actions in the simulator's units; recording, normalising,
choosing episodes by their returns and writing the files is not its business.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

SCRIPTED = {
    "avoid": "dppo_fast.data.scripted.avoid:Avoid",
    "lift": "dppo_fast.data.scripted.lift:Lift",
    "metaworld-reach": "dppo_fast.data.scripted.metaworld:Reach",
    "metaworld-push": "dppo_fast.data.scripted.metaworld:Push",
    "metaworld-drawer-close": "dppo_fast.data.scripted.metaworld:DrawerClose",
    "metaworld-button-press": "dppo_fast.data.scripted.metaworld:ButtonPress",
    "metaworld-button-press-topdown": "dppo_fast.data.scripted.metaworld:ButtonPressTopdown",
    "metaworld-coffee-button": "dppo_fast.data.scripted.metaworld:CoffeeButton",
    "metaworld-window-open": "dppo_fast.data.scripted.metaworld:WindowOpen",
    "metaworld-window-close": "dppo_fast.data.scripted.metaworld:WindowClose",
}
"""Name -> ``module:class``, imported when it is asked for."""


class Demonstrator(Protocol):
    """Decides for N envs, one step at a time. All its randomness follows from the ``seed`` that its constructor got."""

    env: ClassVar[Mapping[str, Any]]
    """The environment's keys (`dppo_fast.envs.EnvConfig`): ``id``, ``max_episode_steps`` and whatever else it needs."""

    def act(self, state: NDArray[np.float64], first: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Actions [N, Da] for ``state`` [N, Do], in the simulator's units; ``first`` [N] marks new episodes."""
        ...


def demonstrator(name: str) -> type[Demonstrator]:
    """The class behind a name of `SCRIPTED`."""
    module, _, attribute = SCRIPTED[name].partition(":")
    return cast("type[Demonstrator]", getattr(importlib.import_module(module), attribute))
