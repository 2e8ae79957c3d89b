"""Algorithms by name; each is one file, whose config dataclass holds its hyperparameters."""

from dppo_fast.algorithms.awr import AWR, AWRConfig
from dppo_fast.algorithms.base import Algorithm
from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.algorithms.calql import CalQL, CalQLConfig
from dppo_fast.algorithms.dipo import DIPO, DIPOConfig
from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.dql import DQL, DQLConfig
from dppo_fast.algorithms.exact_ppo import ExactPPO, ExactPPOConfig
from dppo_fast.algorithms.ibrl import IBRL, IBRLConfig
from dppo_fast.algorithms.idql import IDQL, IDQLConfig
from dppo_fast.algorithms.ppo import PPO, PPOConfig
from dppo_fast.algorithms.qsm import QSM, QSMConfig
from dppo_fast.algorithms.rlpd import RLPD, RLPDConfig
from dppo_fast.algorithms.rwr import RWR, RWRConfig
from dppo_fast.algorithms.sac import SAC, SACConfig

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, tuple[type[Algorithm], type]] = {
    "bc": (BehaviourCloning, BCConfig),
    "ppo": (PPO, PPOConfig),
    "dppo": (DPPO, DPPOConfig),
    "exact_ppo": (ExactPPO, ExactPPOConfig),
    "rwr": (RWR, RWRConfig),
    "awr": (AWR, AWRConfig),
    "dipo": (DIPO, DIPOConfig),
    "idql": (IDQL, IDQLConfig),
    "dql": (DQL, DQLConfig),
    "qsm": (QSM, QSMConfig),
    "sac": (SAC, SACConfig),
    "rlpd": (RLPD, RLPDConfig),
    "calql": (CalQL, CalQLConfig),
    "ibrl": (IBRL, IBRLConfig),
}
"""Name -> the algorithm and its config."""
