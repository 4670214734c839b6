"""One prompt's KV out of the store: look up, plan, load layer by layer, recompute."""
