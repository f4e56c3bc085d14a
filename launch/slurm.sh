#!/bin/bash
# Train on the GPUs of a Slurm cluster: one task a GPU, on as many machines as you ask for.
#
#   sbatch --nodes=4 launch/slurm.sh desc=xl index=1 model.transformer_name=google/flan-t5-xl training.loop.train_batch_size=4096
#
# Submit from the repository. All machines must see the same files: the repository with its .venv (or a `python` that has the
# package), $RESULTS_ROOT_DIR for the runs and $RLHF_FLANT5_CACHE for kept states, both on the shared file system.
# A job that is ended by its time limit or preempted writes a checkpoint and queues itself again, under the same desc and index.
#SBATCH --job-name=rlhf_flant5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# --gpus-per-node, not --gpus-per-task: each task must see all GPUs of its machine, it takes the one that LOCAL_RANK names.
# --signal: the tasks, not this script, are asked to stop 120 s before the end; a checkpoint of xxl, 60 GB, may need more.

: "${RESULTS_ROOT_DIR:?name a directory on the shared file system}" "${RLHF_FLANT5_CACHE:?name a directory on the shared file system}"
PATH=$PWD/.venv/bin:$PATH
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))                      # two jobs on one machine don't meet
OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export PATH MASTER_ADDR MASTER_PORT OMP_NUM_THREADS SRUN_CPUS_PER_TASK

# what each task runs; its numbers are known there alone
# shellcheck disable=SC2016
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m rlhf_flant5.train "$@"'
# no --kill-on-bad-exit: when all have stopped, the first task may still be writing the checkpoint; --wait gives it ten minutes
srun --kill-on-bad-exit=0 --wait=600 bash -c "$task" task resume=true "$@"
code=$?

# 75 (EX_TEMPFAIL): stopped on request, to be continued
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
