"""What full prefill would have said, and what a setting costs: calibration, tuning, fidelity."""
