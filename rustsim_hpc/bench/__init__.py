"""`rustsim-hpc bench`: what the engine costs on this machine, beside loops written by hand."""
