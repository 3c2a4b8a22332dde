#!/bin/bash
# Trains under PBS Pro or OpenPBS:  qsub launch/pbs.sh
# Change the lines below, or overrule them:  qsub -l walltime=4:00:00 launch/pbs.sh
# mpidl submit fills in a copy of this, by the same lines.
#PBS -N mpidl
# Nodes, and of each: cores, ranks (the lines of $PBS_NODEFILE), and with :ngpus=4 GPUs.
#PBS -l select=2:ncpus=2:mpiprocs=2
# Each of these on a node of its own.
#PBS -l place=scatter
#PBS -l walltime=01:00:00
# Output and errors go to one file, with those of PBS itself.
#PBS -j oe

set -euo pipefail
cd "$PBS_O_WORKDIR"  # PBS starts in the home folder

# --- environment: one that all nodes see. With a cluster's own MPI instead of the one in the
# environment, load it first, the same that mpi4py was installed for: module load openmpi
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
# --- end of environment

export OMP_NUM_THREADS=1  # cores of a rank: ncpus / mpiprocs, or each rank's BLAS takes all cores
ranks=$(wc -l < "$PBS_NODEFILE")
hosts=$(uniq -c "$PBS_NODEFILE" | awk '{ print $2 ":" $1 }' | paste -sd,)  # a:2,b:2
gpus_per_node=0
script=launch/pbs.sh  # this one, seen from where it was submitted: PBS runs a copy
train_seconds=3480  # the walltime, less two minutes for a checkpoint: PBS sends no signal ahead

# Where a Trainer writes, and goes on from when the job is started again: as another job, that of a
# job array (qsub -J 0-9) too. {index} in the command becomes the job's index.
first=${MPIDL_FIRST:-${PBS_JOBID%%[.[]*}}
index=${MPIDL_INDEX:-${PBS_ARRAY_INDEX:-}}
run=$PWD/runs/$first
export MPIDL_OUT=$run${index:+/$index}
starts=100  # of one run, at most
(umask 077 && mkdir -p "$MPIDL_OUT")  # it holds checkpoints: for nobody else
rm -f "$MPIDL_OUT/again"  # ranks make it that end with 75; a launcher may do so by itself
exec >> "$MPIDL_OUT/job.log" 2>&1  # PBS would show it at the end of the job
echo "$(date -u +%FT%TZ) started $PBS_JOBID" >> "$MPIDL_OUT/jobs.log"    # for mpidl status

# Each rank sees one GPU: of those of the job, the one of its number on the node.
# shellcheck disable=SC2016  # the rank's shell expands it
one_gpu=(bash -c 'rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${PALS_LOCAL_RANKID:-$PMI_LOCAL_RANK}}}
case $rank in "" | *[!0-9]*) echo "$rank is no number of a rank" >&2; exit 2 ;; esac
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$rank}"
CUDA_VISIBLE_DEVICES=${gpus[rank % ${#gpus[@]}]} exec "$@"' rank)
if ((gpus_per_node == 0)); then one_gpu=(); fi

# On a Cray with PALS: (mpiexec -n "$ranks" --ppn 2 --depth "$OMP_NUM_THREADS" --cpu-bind depth)
launcher=(mpidl run --hosts "$hosts")
container=()  # such as (apptainer exec train.sif), with the same MPI inside as outside
command=(python -m mpi4py examples/digits_mlp.py --strategy ring)
if [[ $index ]]; then command=("${command[@]//'{index}'/$index}"); fi

# In time the ranks get a signal: they finish their step, write a checkpoint, and end with status
# 75, "start me again". In the next job all goes on from there, bit for bit.
echo "$ranks ranks: $hosts"
status=0
timeout --foreground --preserve-status --signal=USR1 "$train_seconds" \
    "${launcher[@]}" "${one_gpu[@]}" "${container[@]}" "${command[@]}" || status=$?
if ((status == 75)) && [[ ! -e $MPIDL_OUT/again ]]; then
    echo "status 75, but no rank asks to be started again: not again" >&2
    status=1
fi
if ((status == 75 && $(grep -c " started " "$MPIDL_OUT/jobs.log") >= starts)); then
    echo "started $starts times, and no end: not again" >&2
    status=1
fi
if ((status == 75)); then  # qrerun is for operators. What is started again is no array.
    cd "$PBS_O_WORKDIR"
    again=MPIDL_FIRST=$first${index:+,MPIDL_INDEX=$index}
    job=$(sed '/^#PBS -J/d' "$script" | qsub -v "$again")
    echo "$(date -u +%FT%TZ) queued $job" >> "$MPIDL_OUT/jobs.log"
fi
exit $status
