"""Run the command line as `python -m rustsim_hpc`."""

from rustsim_hpc.cli.main import main

if __name__ == "__main__":
    main()
