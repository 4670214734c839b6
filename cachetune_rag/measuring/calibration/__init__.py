"""The smallest ratio at which reuse stays close enough to full prefill on a user's own prompts."""
