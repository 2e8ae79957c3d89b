"""Datasets of others as ours: ``FORMATS`` maps names to conversions, one module each."""

from dppo_fast.data.convert.d3il import D3IL
from dppo_fast.data.convert.d4rl import D4RL
from dppo_fast.data.convert.lerobot import LeRobot
from dppo_fast.data.convert.minari import Minari
from dppo_fast.data.convert.reference import Reference
from dppo_fast.data.convert.robomimic import Robomimic
from dppo_fast.data.convert.stream import Block, Conversion, Stream, convert

FORMATS: dict[str, type[Conversion]] = {
    "reference": Reference,
    "d4rl": D4RL,
    "minari": Minari,
    "robomimic": Robomimic,
    "d3il": D3IL,
    "lerobot": LeRobot,
}

__all__ = ["FORMATS", "Block", "Conversion", "Stream", "convert"]
