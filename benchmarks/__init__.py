"""Measurements: what the parts cost, and whether training learns. Results lie in `results/` as CSV, plots come from it."""
