#!/bin/bash
# fastgen sample on several machines under Slurm:
#
#     sbatch --nodes 4 examples/slurm_sample.sh --weights model.safetensors --num 50000 --out /shared/samples
#
# All options go to fastgen sample; the folder of --out is on a file system that all nodes share. A node has one torchrun, which
# starts a rank for each of its GPUs, or for each of its cores where it has none.
#SBATCH --job-name=fastgen-sample
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
# pre-empted, or a node lost: queued again. What is finished in the folder is not drawn again
#SBATCH --requeue
#SBATCH --open-mode=append
# a minute before the time is up the job is queued again too
#SBATCH --signal=B:USR1@60
set -euo pipefail

ranks=${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_PER_TASK}
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then set -- "$@" --device cuda; fi

# the launchers meet at the first node, at a port that other jobs on it are unlikely to have
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))

# that node has a connection from every rank, and 1,024 open files are a common limit
ulimit -n "$(ulimit -Hn)"

# queueing again sends SIGTERM to all ranks, which remove what is half written, and end
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# a rank that fails is started again by its torchrun, and the others with it; a torchrun that gives up ends the job
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$SLURM_JOB_ID" \
    -m -- fastgen sample "$@" &

# a signal ends the first wait, not what it waits for
status=0
wait $! || status=$?
if ((status > 128)); then
    status=0
    wait $! || status=$?
fi
exit "$status"
