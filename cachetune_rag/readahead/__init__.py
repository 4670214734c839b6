"""From disk to host memory behind requests."""
