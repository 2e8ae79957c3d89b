"""Networks: observation (and noisy action, timestep) in, tensors out. Only networks know what an observation
contains.
"""
