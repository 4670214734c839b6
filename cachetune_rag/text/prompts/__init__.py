"""Prompts: chat templates, where the chunks stand, and the ids of the whole."""
