"""The benchmark: how it measures, its sections on CPU and GPU, the code that it compares with, and its record."""
