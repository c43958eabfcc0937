#!/usr/bin/env bash
# The service in Colab, or on any machine behind a wall, under an address of the internet; needs NGROK_AUTHTOKEN.
#   !bash scripts/colab_api.sh [BUNDLE]        blood without one
set -euo pipefail
if [ -z "${SCIMLORA_API_KEY:-}" ]; then
  SCIMLORA_API_KEY=$(scimlora key colab 2>/dev/null | sed -n 's/^SCIMLORA_API_KEY=//p')
  echo "SCIMLORA_API_KEY=$SCIMLORA_API_KEY"
fi
export SCIMLORA_API_KEY
exec scimlora serve "${1:-blood}" --public
