"""The ops: one file each, with its specification in plain PyTorch and its fast versions.

Every op takes ``backend=``: ``reference``, ``triton``, ``native``, or None, for which ``_dispatch`` has the rules.
"""
