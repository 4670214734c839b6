"""What differs between architectures: checks, taps, rotary positions, masks, output projections."""
