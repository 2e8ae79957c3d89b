"""Policies: how to act, and how to score what was done."""
