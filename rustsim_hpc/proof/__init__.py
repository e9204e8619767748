"""Fingerprints of states, and logs of them that are recorded and verified."""
