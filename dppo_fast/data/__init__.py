"""Demonstrations: files, training windows, and a recorder that makes new ones."""

from dppo_fast.data.trajectories import ChunkDataset, Episode, Trajectories, TrajectoryRecorder, epoch_batches

__all__ = ["ChunkDataset", "Episode", "Trajectories", "TrajectoryRecorder", "epoch_batches"]
