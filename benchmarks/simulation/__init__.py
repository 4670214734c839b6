"""A fleet of replicas that answer from one corpus, simulated: what is asked, what caches hold, who answers, how long it takes and what it costs."""
