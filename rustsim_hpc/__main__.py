"""Run the command line as `python -m rustsim_hpc`."""

from rustsim_hpc.cli import main

if __name__ == "__main__":
    main()
