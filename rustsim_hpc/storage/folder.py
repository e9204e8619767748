"""The folder of a run's checkpoints: names, publishing, listing, sweeping, retention.

A checkpoint exists once its first file does: everything else is made durable before that one rename. When one
of the same step is replaced, its old proof stays beside the new one until the rename, so that a kill at any
moment leaves either the old checkpoint or the new one, complete.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path

from rustsim_hpc.errors import CheckpointFileError
from rustsim_hpc.files import fsync_folder, read_bytes, sweep_temporary, write_atomic
from rustsim_hpc.storage.proof import (
    Manifest,
    check_blocks,
    check_size,
    file_errors,
    parse_manifest,
    proof_path,
    read_manifest,
)

_CHECKPOINT = re.compile(r"step_(\d{10,20})\.h5")
_BELONGS = re.compile(r"step_(\d{10,20})\.(proof\.json|previous\.proof\.json|shards-[0-9a-f]+)")


def checkpoint_path(folder: Path, step_index: int) -> Path:
    """Return the path of the checkpoint of a step: `step_0000000100.h5`."""
    return folder / f"step_{step_index:010d}.h5"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's path.

    Raises:
        CheckpointFileError: it is not the name of a checkpoint.
    """
    match = _CHECKPOINT.fullmatch(path.name)
    if match is None:
        raise CheckpointFileError(
            message=f"{path}: checkpoints are called step_0000000100.h5 or so", damaged=False
        )
    return int(match[1])


def shards_path(path: Path, nonce: str) -> Path:
    """Return the folder for the shards of one attempt to write `path`."""
    return path.with_name(f"{path.stem}.shards-{nonce}")


def previous_path(path: Path) -> Path:
    """Return the path of the old proof while the checkpoint `path` is replaced."""
    return path.with_name(f"{path.stem}.previous.proof.json")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the published checkpoints of a folder, newest first; none where there is no folder.

    Raises:
        CheckpointFileError: the folder cannot be read.
    """
    with file_errors(folder):
        found = (
            [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)] if folder.exists() else []
        )
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(folder: Path, step: int) -> Path:
    """Return the published checkpoint of a step, without verifying it.

    Raises:
        CheckpointFileError: there is none, or the folder cannot be read.
    """
    found = {step_of(path): path for path in list_checkpoints(folder)}
    if step not in found:
        steps = ", ".join(map(str, sorted(found)))
        raise CheckpointFileError(
            message=f"{folder}: there is no checkpoint of step {step}",
            damaged=False,
            hint=f"there are steps {steps}; checkpoint.keep says how many are kept" if steps else None,
        )
    return found[step]


def manifest_of(path: Path) -> Manifest:
    """Return the proof of the checkpoint `path`, verified by its own checksum and against the files' sizes.

    Raises:
        CheckpointFileError: there is none, it is invalid, or a file is missing or has another size.
    """
    with file_errors(path):
        if path.is_dir():
            raise CheckpointFileError(message=f"{path}: it is a folder, not a checkpoint")
        if not path.exists():
            raise CheckpointFileError(message=f"{path}: there is no such file", damaged=False)
        replaced = previous_path(path).exists()
    if not replaced:
        manifest = read_manifest(proof_path(path))
    else:
        # A replacement was interrupted: only the file's bytes tell which of the two proofs is its own.
        try:
            manifest = read_manifest(proof_path(path))
            check_first(path, manifest)
        except CheckpointFileError:
            manifest = read_manifest(previous_path(path))
    if manifest.files[0].name != path.name:
        raise CheckpointFileError(message=f"{path}: the proof beside it is that of {manifest.files[0].name}")
    for file in manifest.files:
        check_size(path.parent, file)
    return manifest


def check_first(path: Path, manifest: Manifest) -> None:
    """Compare the first file of a checkpoint with its proof.

    Raises:
        CheckpointFileError: they do not match.
    """
    first = manifest.files[0]
    check_size(path.parent, first)
    check_blocks(path.parent, [(first, 0, len(first.blocks))])


def publish(path: Path, first: Path, proof: Path) -> None:
    """Rename a checkpoint's first file and its proof, both durable under temporary names, to their names.

    `settle` makes the renames durable.

    Raises:
        OSError: a rename failed; an existing checkpoint of that name is as it was.
    """
    previous = previous_path(path)
    if path.exists() and proof_path(path).exists():
        write_atomic(previous, read_bytes(proof_path(path)))
    try:
        proof.replace(proof_path(path))
        # The proof must be on disk before its file is: a crash may keep the later rename only.
        fsync_folder(path.parent)
        first.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            if previous.exists():
                previous.replace(proof_path(path))
            elif not path.exists():
                proof_path(path).unlink(missing_ok=True)
        raise


def settle(path: Path) -> None:
    """Make the renames of a checkpoint just published durable, and remove what it replaced.

    Raises:
        OSError: the folder cannot be synced. The checkpoint is there all the same.
    """
    fsync_folder(path.parent)
    # What cannot be removed now is swept at the next start.
    with contextlib.suppress(OSError, CheckpointFileError):
        previous_path(path).unlink(missing_ok=True)
        _remove(_shards(path, keep=_owned_shards(path)))


def sweep(folder: Path) -> list[Path]:
    """Remove what killed attempts left in a folder of checkpoints; return the paths. For its writer only.

    Files of a published checkpoint, valid or damaged, stay; so do those that were moved aside.

    Raises:
        CheckpointFileError: the folder cannot be read or changed.
    """
    if not folder.exists():
        return []
    with file_errors(folder, "sweep"):
        removed = sweep_temporary(folder)
        published = set(list_checkpoints(folder))
        for path in published:
            removed += _sweep_one(path)
        for path in sorted(folder.iterdir()):
            match = _BELONGS.fullmatch(path.name)
            if match and path.with_name(f"step_{match[1]}.h5") not in published:
                removed += _remove([path])
        fsync_folder(folder)
    return removed


def _sweep_one(path: Path) -> list[Path]:
    """Complete or undo an interrupted replacement of `path`; remove the shards of failed attempts."""
    removed: list[Path] = []
    try:
        if previous_path(path).exists():
            manifest = manifest_of(path)
            if _same_text(proof_path(path), manifest):
                removed += _remove([previous_path(path)])
            else:
                previous_path(path).replace(proof_path(path))
        removed += _remove(_shards(path, keep=_owned_shards(path)))
    except CheckpointFileError:
        # It is damaged: none of its files is touched here.
        return removed
    return removed


def _same_text(proof: Path, manifest: Manifest) -> bool:
    try:
        return parse_manifest(read_bytes(proof), proof) == manifest
    except CheckpointFileError:
        return False


def _owned_shards(path: Path) -> set[str]:
    """Return the names of the folders that hold the published checkpoint's shards."""
    return {file.name.split("/", 1)[0] for file in read_manifest(proof_path(path)).files if "/" in file.name}


def _shards(path: Path, keep: Iterable[str] = ()) -> list[Path]:
    return [
        found
        for found in sorted(path.parent.glob(f"{path.stem}.shards-*"))
        if found.name not in set(keep) and _BELONGS.fullmatch(found.name)
    ]


def _remove(paths: Iterable[Path]) -> list[Path]:
    gone = list(paths)
    for path in gone:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return gone


def move_aside(path: Path, reason: str) -> Path:
    """Rename all files of a checkpoint to `*.bad`, and write the reason to a text file beside them.

    Returns the new name of its first file.

    Raises:
        CheckpointFileError: a file cannot be renamed.
    """
    with file_errors(path, "move aside"):
        endings = chain([".bad"], (f".bad{number}" for number in count(2)))
        ending = next(end for end in endings if not path.with_name(path.name + end).exists())
        aside = path.with_name(path.name + ending)
        # The first file last: were it gone before, a kill would leave the others to be swept.
        for other in [proof_path(path), previous_path(path), *_shards(path)]:
            if other.exists():
                other.rename(other.with_name(other.name + ending))
        path.rename(aside)
        aside.with_name(aside.name + ".txt").write_text(reason + "\n", encoding="utf-8")
        fsync_folder(path.parent)
    return aside


def steps_to_drop(steps: Sequence[int], keep: int, keep_every: int) -> list[int]:
    """Return which steps of published checkpoints retention drops, oldest first.

    keep: how many of the newest stay, 0 for all. keep_every: multiples of it stay, too; 0 for none.
    """
    if keep <= 0:
        return []
    old = sorted(steps)[:-keep]
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def delete_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its first file first, so that what a kill leaves is swept later.

    Raises:
        OSError: a file cannot be removed.
    """
    path.unlink(missing_ok=True)
    _remove([proof_path(path), previous_path(path), *_shards(path)])


def retain(folder: Path, keep: int, keep_every: int) -> list[Path]:
    """Remove the checkpoints that retention drops; return their paths.

    Raises:
        CheckpointFileError: one cannot be removed.
    """
    steps = [step_of(path) for path in list_checkpoints(folder)] if keep else []
    gone = [checkpoint_path(folder, step) for step in steps_to_drop(steps, keep, keep_every)]
    for path in gone:
        with file_errors(path, "remove"):
            delete_checkpoint(path)
    return gone
