#!/usr/bin/env bash
# A sweep as an array job of SLURM, one trial per array index; the same command again gathers the leaderboard.
#
#   launch/slurm/sweep.sh --config=FILE[:ARG] --sweep=FILE --workdir=DIR [--sbatch_options='--time=60 --gpus=1']
#       [--wait] [--dry-run] [--config.FIELD=VALUE ...]
#
# It is `clipjax sweep --launcher=slurm`, which carries the array's script itself and writes it to DIR/sweep.sbatch.
set -euo pipefail
case ${1:-} in -h|--help|'') sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
read -ra clipjax <<<"${CLIPJAX:-clipjax}"
command -v "${clipjax[0]}" >/dev/null || { echo "launch/slurm/sweep.sh: error: no command ${clipjax[0]}" >&2; exit 2; }
full=("${clipjax[@]}" sweep --launcher=slurm "$@")
printf '+ %s\n' "$(printf '%q ' "${full[@]}")"
exec "${full[@]}"
