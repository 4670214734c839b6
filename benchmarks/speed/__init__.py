"""Time to first token by context, tier, codec, selector and ratio, on one GPU and in one process."""
