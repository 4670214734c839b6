"""The model's forwards on a CUDA device: kernels, graphs, compiled layers."""
