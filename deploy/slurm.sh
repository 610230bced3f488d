#!/usr/bin/env bash
# One process per machine, with all its GPUs:   sbatch deploy/slurm.sh --config=... --workdir=...
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# --signal: SIGTERM to the processes, not to this script, 180 s before the time is over: they save and leave with 75.
# srun says which process each one is, so nothing is said about that here.
srun --kill-on-bad-exit=0 python train.py "$@"
code=$?
# 75: stopped, or another process was lost; above 128: killed; 74: disk, network or a data worker failed, which may last,
# so that is tried ten times. The same job continues from the newest checkpoint.
if [ "$code" -eq 75 ] || [ "$code" -gt 128 ] || { [ "$code" -eq 74 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
