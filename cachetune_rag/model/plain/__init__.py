"""The model's forwards on any device, by transformers' own layers."""
