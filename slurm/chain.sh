#!/bin/bash
# Run a job that is longer than a time limit on a site without requeue: submit it several times, each link waiting for
# those before it. A link continues where the last one stopped; when one has finished the run, Slurm drops the rest.
#
#   LINKS=6 JOB=flock.toml OUT=runs/flock bash slurm/chain.sh --nodes=4 --time=04:00:00
#
# Options go to sbatch. To stop the chain, cancel all its jobs with the line that it prints.
set -eu

LINKS=${LINKS:-4}
SCRIPT=${SCRIPT:-$(dirname "${BASH_SOURCE[0]}")/cpu.sbatch}
export OUT=${OUT:-runs/chain-$(date +%Y%m%d-%H%M%S)}

ids=()
for ((link = 1; link <= LINKS; link++)); do
    # Not ok is a link that was stopped by the time limit (75), lost a node, or failed. It waits for all before it: one
    # that has been dropped is not ok either.
    after=()
    if ((link > 1)); then
        after=("--dependency=afternotok:$(IFS=:; echo "${ids[*]}")" --kill-on-invalid-dep=yes)
    fi
    id=$(sbatch --parsable ${after[@]+"${after[@]}"} "$@" "$SCRIPT")
    ids+=("${id%%;*}")
done
echo "$OUT: jobs ${ids[*]}; to stop: scancel ${ids[*]}"
