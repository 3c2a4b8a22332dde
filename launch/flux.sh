#!/bin/bash
# Trains under Flux:  flux batch launch/flux.sh
# Change the lines below, or overrule them:  flux batch --nodes=4 --time-limit=4h launch/flux.sh
# mpidl submit fills in a copy of this, by the same lines.
# flux: --job-name=mpidl
# flux: --nodes=2
# flux: --nslots=4               # ranks in all
# flux: --cores-per-slot=1       # of a rank, for its BLAS threads
# flux: --time-limit=3600s
# flux: --output=mpidl-{{id}}.log

set -euo pipefail
from=$PWD
cd .  # Flux starts it where it was submitted

# --- environment: one that all nodes see. With a cluster's own MPI instead of the one in the
# environment, load it first, the same that mpi4py was installed for: module load openmpi
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
# --- end of environment

export OMP_NUM_THREADS=1  # cores of a rank, or each rank's BLAS takes all cores of the node
ranks=4
nodes=2
gpus_per_rank=0
script=launch/flux.sh  # this one, seen from where it was submitted: Flux runs a copy
train_seconds=3570  # the time limit, less half a minute
stop_seconds=90  # so long before that the ranks get a signal

# Where a Trainer writes, and goes on from when the job is started again: as another job.
export MPIDL_FIRST=${MPIDL_FIRST:-$(flux getattr jobid)}
run=$PWD/runs/$MPIDL_FIRST
export MPIDL_OUT=$run
starts=100  # of one run, at most
(umask 077 && mkdir -p "$MPIDL_OUT")  # it holds checkpoints: for nobody else
rm -f "$MPIDL_OUT/again"  # ranks make it that end with 75; a launcher may do so by itself
echo "$(date -u +%FT%TZ) started $(flux getattr jobid)" >> "$MPIDL_OUT/jobs.log"  # for mpidl status

# In time Flux sends the ranks a signal: they finish their step, write a checkpoint, and end with
# status 75, "start me again". MPICH needs no more; Open MPI 5: also -o pmi=pmix (flux-pmix).
launcher=(flux run --nodes="$nodes" --ntasks="$ranks" --cores-per-task="$OMP_NUM_THREADS"
    --time-limit="${train_seconds}s" --signal="USR1@${stop_seconds}s")
if ((gpus_per_rank)); then launcher+=(--gpus-per-task="$gpus_per_rank" -o gpu-affinity=per-task); fi
container=()  # such as (apptainer exec train.sif), with the same MPI inside as outside
command=(python -m mpi4py examples/digits_mlp.py --strategy ring)

status=0
"${launcher[@]}" "${container[@]}" "${command[@]}" || status=$?
if ((status == 75)) && [[ ! -e $MPIDL_OUT/again ]]; then
    echo "status 75, but no rank asks to be started again: not again" >&2
    status=1
fi
if ((status == 75 && $(grep -c " started " "$MPIDL_OUT/jobs.log") >= starts)); then
    echo "started $starts times, and no end: not again" >&2
    status=1
fi
if ((status == 75)); then  # in the next job all goes on from there, bit for bit
    cd "$from"
    job=$(flux --parent batch "$script")
    echo "$(date -u +%FT%TZ) queued $job" >> "$MPIDL_OUT/jobs.log"
fi
exit $status
