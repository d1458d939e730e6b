#!/bin/bash
# Two machines of eight GPUs under Slurm:
#
#   sbatch configs/cluster/slurm.sh run.yaml
#
# Slurm sends SIGTERM before it stops or preempts the job: the run saves and leaves, and --requeue starts it again, where
# `--resume latest` goes on, bit for bit. The first start has nothing to resume, and starts.
#SBATCH --job-name=mmdit-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
config=${1:?give the config of the run}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$first:29500" --rdzv_id "$SLURM_JOB_ID" \
  -m mmdit_lora.cli.main train "$config" --resume latest
