#!/usr/bin/env bash
# A grid over two network namespaces, as over two machines: a head of Ray in one, a node in the other, joined by a veth
# pair; the node is killed in the middle, and the table is compared with that of the same grid without Ray.
#
#     sudo benchmarks/namespaces.sh
#
# Needs root and `ip netns`; without, it says so and ends with exit code 77 (skipped). Leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
skip() { echo "skipped: $1"; exit 77; }
[ "$(id -u)" = 0 ] || skip "needs root"
command -v ip > /dev/null || skip "needs ip, of iproute2"
python -c 'import ray' 2> /dev/null || skip "needs ray: pip install 'perdure[ray]'"
head=perdure-head node=perdure-node out=$(mktemp -d)
end() { ip netns pids "$1" 2> /dev/null | xargs --no-run-if-empty kill -9 2> /dev/null || true; } # all that runs in there
clean() {
  for each in $head $node; do end $each; ip netns del $each 2> /dev/null || true; done
  rm -rf "$out"
}
until_so() { # what is waited for, for ten minutes at most
  for _ in $(seq 600); do if "$@" > /dev/null 2>&1; then return; fi; sleep 1; done
  echo "waited ten minutes in vain for: $*"; tail -n 5 "$out"/*.log; exit 1
}
trap clean EXIT
ip netns add $head 2> "$out/why" && ip netns add $node 2> "$out/why" || skip "no network namespaces here: $(cat "$out/why")"
ip link add perdure0 netns $head type veth peer name perdure1 netns $node 2> "$out/why" || skip "no veth pairs here: $(cat "$out/why")"
for each in "$head perdure0 10.213.7.1" "$node perdure1 10.213.7.2"; do
  read -r space link address <<< "$each"
  ip -n "$space" address add "$address/24" dev "$link"
  ip -n "$space" link set "$link" up
  ip -n "$space" link set lo up
done
export RAY_AUTH_MODE=disabled # nobody else is in these networks
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ray_in() { # namespace, words of `ray start`
  local space=$1; shift
  ip netns exec "$space" ray start --block --num-cpus 1 --disable-usage-stats "$@" > "$out/$space.log" 2>&1 &
}
nodes() { [ "$(ip netns exec $head ray status --address 10.213.7.1:6379 | grep -c node_)" -ge "$1" ]; }
learnt() { compgen -G "$out/there/*/task-000/manifest.json"; }
ray_in $head --head --node-ip-address 10.213.7.1 --port 6379 --include-dashboard false --temp-dir "$out/h"
until_so nodes 1
ray_in $node --node-ip-address 10.213.7.2 --address 10.213.7.1:6379
until_so nodes 2
echo "two nodes are there"
grid=(python -m perdure compare --stream 'synthetic(tasks=3, per_class=8, test_per_class=8)' --backbone 'tiny()' --epochs 20
  --batch-size 2 --save-every 10 --precision fp32 --attention sdpa --device cpu --seeds 0 1 --json
  --methods 'lora(rank=2)' 'inflora(rank=2)')
"${grid[@]}" --out "$out/here" > /dev/null
ip netns exec $head "${grid[@]}" --out "$out/there" --on 10.213.7.1:6379 > /dev/null &
running=$!
until_so learnt
end $node
echo "a cell has learnt its first task, and the node is killed"
wait $running
python - "$out" << 'PYTHON'
import json, sys
here, there = (json.load(open(f"{sys.argv[1]}/{name}/compare.json")) for name in ("here", "there"))
timed = ("seconds", "evaluation_seconds", "images_per_second")
same = [{k: v for k, v in row.items() if k not in timed and not k.startswith("step")} for row in here] == [
    {k: v for k, v in row.items() if k not in timed and not k.startswith("step")} for row in there
]
print(f"{len(there)} methods, the same table: {same}")
sys.exit(not same)
PYTHON
