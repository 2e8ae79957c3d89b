"""Fine-tuning of diffusion policies with PPO (DPPO, Ren et al. 2024, arXiv 2409.00588)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dppo_fast.accelerated import accelerate
    from dppo_fast.deploy import load_policy

__version__ = "0.1.0"
__all__ = ["accelerate", "load_policy"]

_MODULES = {"accelerate": "accelerated", "load_policy": "deploy"}


def __getattr__(name: str) -> Any:
    """What needs PyTorch is imported when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
