"""From a job file to a finished run: keys, plan, preparation, the loop, and everything beside it."""
