"""Time to first token over contexts, tiers, codecs, selectors and ratios, on one card in one process."""
