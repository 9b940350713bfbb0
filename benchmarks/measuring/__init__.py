"""The programs that speed, kernels and precision measure, and their tools."""
