"""The ranks of a run: who they are, what they agree on, where they meet."""
