#!/bin/bash
# A run on several machines of a Slurm cluster: one torchrun on each of them.
#
#   sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh run.yaml layout.dp=32
#
# Ten minutes before the job's time is over Slurm sends SIGTERM: the run saves and ends, and the same command goes on.
# RANKS: ranks of a machine (default: its devices, as Slurm counts them, else 8). PORT: where they meet (default 29500).
#SBATCH --job-name=mmfn
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@600
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # read whole: cut short by a pipe, scontrol may die of it
head=${hosts%%$'\n'*}
ranks=${RANKS:-${SLURM_GPUS_ON_NODE:-8}}

# a save may take longer than the 30 seconds that torchrun waits for by itself
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    -m mmfn train "$@"
