#!/usr/bin/env bash
# Everything that needs a GPU, in one command; check_gpu.py says what. PYTHON: the interpreter that has torch.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for python in "${PYTHON:-}" python3 python; do
  if [ -n "$python" ] && command -v "$python" > /dev/null; then
    exec "$python" "$here/check_gpu.py" "$@"
  fi
done
echo "check_gpu.sh: expected python3 or python on PATH, or PYTHON=<interpreter>" >&2
exit 1
