#!/usr/bin/env bash
# A training over all nodes of a Slurm job: Ray's head and the training on the first node, Ray on the others.
#
#   sbatch examples/cluster/slurm.sh /shared/my.yaml trainer.run_dir=/shared/runs/my
#
# Submit it from the repository, which lies, as do data, model and run directory, where all nodes see it.
# A quarter of an hour before the time limit, or by `scancel --signal=TERM --batch JOB`, the training writes a
# checkpoint and ends with 143; the job then goes back into the queue and on from there. MSSR_HEAD_IP is the first
# node's address in the network to use, if that is not the one of its default route.
#SBATCH --job-name=mssr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
export PATH=${MSSR_VENV:-$PWD/.venv}/bin:$PATH
ulimit -n "$(ulimit -Hn)" || true

# The training is a child of this shell, which Slurm signals; bash runs a trap only while it waits.
training=""
stopped=""
trap 'if [[ $training ]]; then kill -TERM "$training"; else stopped=yes; fi' TERM

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
ip=${MSSR_HEAD_IP:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
address=$ip:$((20000 + SLURM_JOB_ID % 10000))
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
# srun would take the number of tasks of the whole job from its environment.
step=(srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpus-per-node="${SLURM_GPUS_PER_NODE:-0}")
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block)

"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$first" \
    ray start --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false "${resources[@]}" &
if ((others = SLURM_JOB_NUM_NODES - 1)); then
    "${step[@]}" --nodes=$others --ntasks=$others --exclude="$first" \
        ray start --address="$address" "${resources[@]}" &
fi
python examples/cluster/wait_for_nodes.py "$SLURM_JOB_NUM_NODES" "$address"
mssr doctor "$@" --address "$address"

mssr train "$@" cluster.address="$address" &
training=$!
[[ -z $stopped ]] || kill -TERM "$training"
while kill -0 "$training" 2>/dev/null; do wait "$training" || true; done # a signal ends a wait early
status=0
wait "$training" || status=$?
# Only what was stopped with a checkpoint is worth another start.
if ((status == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
