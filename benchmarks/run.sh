#!/usr/bin/env bash
# First figures: starts a server with 16 synthetic adapters, measures the base alone and with adapters,
# at one stream and at 16, and stops it. The first argument is the bin folder of a virtual environment with the bench extra, the
# others go to serve.py.
set -euo pipefail
bin=$(cd "${1:-.venv/bin}" && pwd)
shift || true
cd "$(dirname "${BASH_SOURCE[0]}")/.."
port=${PORT:-8011}
targets=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
url=http://127.0.0.1:$port

"$bin/python" -m deltamux.benchmarks.make_adapters --count 16 --rank 16 --targets "$targets" --out build/bench-adapters
"$bin/deltamux" serve smollm2 --dtype bfloat16 --port "$port" --adapter-dir build/bench-adapters &
server=$!
trap 'kill "$server"; wait "$server" || true' EXIT
until "$bin/python" -c 'import sys, httpx; httpx.get(sys.argv[1]).raise_for_status()' "$url/ready" 2>/dev/null; do
    kill -0 "$server" || { echo "the server ended before it was ready" >&2; exit 1; }
    sleep 1
done
for load in "--concurrency 1 --requests 8" "--concurrency 1 --requests 8 --adapters 1" \
    "--concurrency 16 --requests 96" "--concurrency 16 --requests 96 --adapters 16"; do
    # shellcheck disable=SC2086  # the words of a load are options of their own
    "$bin/python" -m deltamux.benchmarks.serve --base-url "$url" $load "$@"
done
