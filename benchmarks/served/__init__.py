"""Parts of `serving.py`."""
