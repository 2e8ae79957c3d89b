"""Noise schedules, sampling and likelihoods of diffusion policies; networks come in as arguments."""
