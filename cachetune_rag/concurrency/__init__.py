"""Threads, deadlines, forks, and turns at the model."""
