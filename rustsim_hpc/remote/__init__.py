"""Partitions on workers behind endpoints: ZeroMQ sockets with CURVE, messages without code or pickle.

:mod:`~rustsim_hpc.remote.sockets` is the only door to pyzmq, which is an extra (``rustsim-hpc[remote]``).
"""
