"""Headroom: how much halting could save on a model at best, and how much of it can be seen while the loop runs."""

from haltkit.headroom.account import Headroom, HeadroomAccount
from haltkit.headroom.oracles import Definition
from haltkit.headroom.predictability import Auc, AucAccount, auc
from haltkit.headroom.probe import LogisticProbe, ProbeAccount, fit_logistic, probe_by_step, split_by_sequence
from haltkit.headroom.regret import Regret, RegretAccount, realised
from haltkit.headroom.thresholds import ThresholdAccount, Thresholds

__all__ = [
    "Auc",
    "AucAccount",
    "Definition",
    "Headroom",
    "HeadroomAccount",
    "LogisticProbe",
    "ProbeAccount",
    "Regret",
    "RegretAccount",
    "ThresholdAccount",
    "Thresholds",
    "auc",
    "fit_logistic",
    "probe_by_step",
    "realised",
    "split_by_sequence",
]
