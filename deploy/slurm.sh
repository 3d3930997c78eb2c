#!/usr/bin/env bash
# One Detour run under Slurm: starts Ray on the allocated nodes, trains, and requeues itself after an early stop.
#   sbatch deploy/slurm.sh modernbert-base-bio-en --output /shared/runs/bio
#SBATCH --job-name=detour
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --open-mode=append
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"   # because srun does not inherit it from sbatch
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')   # keeps other users of the nodes out
export RAY_AUTH_TOKEN
resources=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}" ${SLURM_GPUS_ON_NODE:+--num-gpus "$SLURM_GPUS_ON_NODE"})

# Ask Ray for the address, because a host name may resolve to a loopback address or to several addresses.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" python -c 'import ray; print(ray.util.get_node_ip_address())')
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false "${resources[@]}" --block &
if ((${#nodes[@]} > 1)); then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" --overlap \
        ray start --address="$address:$port" "${resources[@]}" --block &
fi

trap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT     # Ray ends with the script, whose exit code stays
export RAY_ADDRESS="$address:$port"
for _ in $(seq 60); do if ray health-check --address "$RAY_ADDRESS"; then break; else sleep 2; fi; done
detour-train "$@" --nodes "${#nodes[@]}" &
train=$!
trap 'kill -TERM $train' TERM      # Slurm's notice, 180 s before the end: save and exit 75
code=0
wait $train || code=$?
if ((code > 128)); then code=0; wait $train || code=$?; fi   # because the notice interrupts the first wait
if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
