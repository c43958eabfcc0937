#!/usr/bin/env bash
# The service and the page on this machine; Ctrl-C ends both.
#   scripts/start.sh [BUNDLE]        blood without one; SCIMLORA_PORT and SCIMLORA_API_KEY are heeded
set -euo pipefail
page="$(cd "$(dirname "$0")/../ui" && pwd)"
port=${SCIMLORA_PORT:-8000}
scimlora serve "${1:-blood}" --port "$port" &
service=$!
trap 'kill "$service" 2>/dev/null || true' EXIT
until curl -sf "http://127.0.0.1:$port/readyz" >/dev/null; do
  kill -0 "$service" 2>/dev/null || { wait "$service"; exit 1; }  # it has said why
  sleep 0.2
done
API_URL="http://127.0.0.1:$port" API_KEY=${SCIMLORA_API_KEY:-} streamlit run "$page/src/streamlit_app.py"
