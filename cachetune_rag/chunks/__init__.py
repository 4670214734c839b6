"""A chunk's life outside of requests: lead-ins, precompute, storing what requests missed, finding stored chunks in prompts."""
