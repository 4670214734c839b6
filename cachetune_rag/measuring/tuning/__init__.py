"""Finding the ratio at which a tier answers soonest on this machine: search, measurement, saved results."""

from cachetune_rag.measuring.tuning.result import Point, TierTuning, TuneProgress, TuningResult

__all__ = ["Point", "TierTuning", "TuneProgress", "TuningResult"]
