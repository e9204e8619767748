"""Checkpoints as files: one logical HDF5 file, written by all ranks, proved before and after reading.

docs/checkpoint_format.md has the tree and the rules. `header` has a checkpoint's metadata, `proof` the
checksums, `hdf5` the tree, `folder` the names and the publishing; `reading`, `restoring` and `writer` are
what others call.
"""

from rustsim_hpc.storage.folder import (
    checkpoint_path,
    delete_checkpoint,
    list_checkpoints,
    manifest_of,
    move_aside,
    retain,
    step_of,
    steps_to_drop,
    sweep,
)
from rustsim_hpc.storage.header import FORMAT_NAME, FORMAT_VERSION, LAYOUTS, CheckpointHeader, StorageOptions
from rustsim_hpc.storage.proof import Manifest, proof_path
from rustsim_hpc.storage.reading import prove, read_header, read_rows
from rustsim_hpc.storage.restoring import LoadedCheckpoint, load, load_newest, verify
from rustsim_hpc.storage.writer import CheckpointWriter, write_checkpoint

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "LAYOUTS",
    "CheckpointHeader",
    "CheckpointWriter",
    "LoadedCheckpoint",
    "Manifest",
    "StorageOptions",
    "checkpoint_path",
    "delete_checkpoint",
    "list_checkpoints",
    "load",
    "load_newest",
    "manifest_of",
    "move_aside",
    "proof_path",
    "prove",
    "read_header",
    "read_rows",
    "retain",
    "step_of",
    "steps_to_drop",
    "sweep",
    "verify",
    "write_checkpoint",
]
