"""Finding known chunk texts inside a prompt."""
