"""The Triton kernels, a file for each operation, and the functions that launch them on tensors already checked.

Blocks are chosen by shape in Python, never by trial at run time, so that every rank and every run does the same sums. Row offsets are
int64: a packed micro-batch may hold more than 2^31 elements.
"""
