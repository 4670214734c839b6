"""Finds the ratio at which requests from a tier are answered soonest on this machine."""

from cachetune_rag.measuring.tuning.result import Point, TierTuning, TuneProgress, TuningResult

__all__ = ["Point", "TierTuning", "TuneProgress", "TuningResult"]
