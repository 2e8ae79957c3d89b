"""Fine-tuning of diffusion policies with PPO (DPPO, Ren et al. 2024, arXiv 2409.00588)."""

__version__ = "0.1.0"
