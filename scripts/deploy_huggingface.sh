#!/usr/bin/env bash
# The page as a Space of the Hugging Face Hub; needs HF_TOKEN, and API_KEY where the service wants one.
#   scripts/deploy_huggingface.sh OWNER/NAME [--dry-run] [--bundle DIR | --api-url URL] [--private]
set -euo pipefail
exec scimlora space deploy "$@" --folder "$(cd "$(dirname "$0")/../ui" && pwd)"
