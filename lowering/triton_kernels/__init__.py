"""Triton GEMMs for what no kept library multiplies: see `ops` for the operators.

The letters of every file here: a is an activation ``[M, K]``, b a weight ``[N, K]`` as its format
stores it, and the result is ``a @ b.T``, ``[M, N]``. Any M, N and K are taken, M = 1 too; edges are
masked. Only the device code imports Triton, when a kernel is first launched, so that a machine
without it lowers for any target.
"""
