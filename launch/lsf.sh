#!/bin/bash
# Trains under IBM Spectrum LSF:  bsub < launch/lsf.sh
# Change the lines below, or overrule them:  bsub -W 4:00 < launch/lsf.sh
# mpidl submit fills in a copy of this, by the same lines.
#BSUB -J mpidl
# Slots in all, and on a host: where a slot is a core, one for each core of a rank.
#BSUB -n 4
#BSUB -R "span[ptile=2]"
# Hours and minutes.
#BSUB -W 1:00
# To the job, two minutes before the time is over.
#BSUB -wa USR1
#BSUB -wt 2
# Queued again when it ends so, and when a host fails.
#BSUB -Q 75
#BSUB -r
#BSUB -o mpidl-%J.log

set -euo pipefail
cd "$LS_SUBCWD"

# --- environment: one that all nodes see. With a cluster's own MPI instead of the one in the
# environment, load it first, the same that mpi4py was installed for: module load openmpi
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
# --- end of environment

export OMP_NUM_THREADS=1  # cores of a rank, or each rank's BLAS takes all cores of the node
ranks=4
nodes=2
hosts=$(uniq "$LSB_DJOB_HOSTFILE" | sed "s/$/:$((ranks / nodes))/" | paste -sd,)  # a:2,b:2
gpus_per_node=0  # asked for by: bsub -gpu num=4

# Where a Trainer writes, and goes on from when the job is started again. Of a job array
# (bsub -J "name[1-10]") each job has its own, and {index} in the command becomes its index.
run=$PWD/runs/$LSB_JOBID
index=${LSB_JOBINDEX:-0}
if ((index == 0)); then index=; fi  # 0 means: no array
export MPIDL_OUT=$run${index:+/$index}
starts=100  # of one run, at most
(umask 077 && mkdir -p "$MPIDL_OUT")  # it holds checkpoints: for nobody else
rm -f "$MPIDL_OUT/again"  # ranks make it that end with 75; a launcher may do so by itself
exec >> "$MPIDL_OUT/job.log" 2>&1  # LSF would show it at the end of the job
echo "$(date -u +%FT%TZ) started $LSB_JOBID" >> "$MPIDL_OUT/jobs.log"    # for mpidl status

# Each rank sees one GPU: of those of the job, the one of its number on the node.
# shellcheck disable=SC2016  # the rank's shell expands it
one_gpu=(bash -c 'rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-0}}
case $rank in "" | *[!0-9]*) echo "$rank is no number of a rank" >&2; exit 2 ;; esac
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$rank}"
CUDA_VISIBLE_DEVICES=${gpus[rank % ${#gpus[@]}]} exec "$@"' rank)
if ((gpus_per_node == 0)); then one_gpu=(); fi

# With IBM's MPI: (jsrun -n "$ranks"). Where hosts are not reached by ssh, to mpidl run with Open
# MPI also: --launcher-args "--prtemca plm_ssh_agent blaunch"
launcher=(mpidl run --hosts "$hosts")
container=()  # such as (apptainer exec train.sif), with the same MPI inside as outside
command=(python -m mpi4py examples/digits_mlp.py --strategy ring)
if [[ $index ]]; then command=("${command[@]//'{index}'/$index}"); fi

# Start it, and pass the signal on: the ranks finish their step, write a checkpoint, and end with
# status 75, "start me again". In the same job all goes on from there, bit for bit.
echo "$ranks ranks: $hosts"
trap '[[ -z ${!:-} ]] || kill -USR1 $!' USR1
"${launcher[@]}" "${one_gpu[@]}" "${container[@]}" "${command[@]}" &
status=0
wait $! || status=$?
while ((status == 128 + 10)); do  # the signal has ended no more than this waiting
    status=0
    wait $! || status=$?
done
if ((status == 75)) && [[ ! -e $MPIDL_OUT/again ]]; then
    echo "status 75, but no rank asks to be started again: not again" >&2
    status=1
fi
if ((status == 75 && $(grep -c " started " "$MPIDL_OUT/jobs.log") >= starts)); then
    echo "started $starts times, and no end: not again" >&2
    status=1
fi
exit $status
