"""Measurements: what the parts cost, and whether training learns. Results lie in `results/`, plots come from CSV."""
