"""The model's forwards on a CUDA device, with kernels, CUDA graphs and compiled layers."""
