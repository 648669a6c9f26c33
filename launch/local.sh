#!/usr/bin/env bash
# N processes of one run on this machine.
#
#   launch/local.sh N [--devices=M] [--restarts=R] [--dry-run] --config=FILE[:ARG] --workdir=DIR [... of clipjax train]
#
#   N             how many processes; with NVIDIA GPUs each gets one of its own, so N may not exceed their number
#   --devices=M   simulate M CPU devices in each process
#   --restarts=R  start all again, at most R times, after a failure that needs no person: not after codes 2 and 3, nor
#                 after SIGTERM or Ctrl-C (143, 130); the run goes on from its newest checkpoint
#   --dry-run     print what would be run, and run nothing
#
# Process 0 writes to this terminal; lines of the others begin with "[rank I]". SIGTERM and Ctrl-C reach all processes:
# they save at the same step and leave with 143; the same command goes on. When a process fails, the others are
# ended after 60 seconds, and the exit code is that of the first that failed (of several at once, the highest).
# CLIPJAX names another command than "clipjax", CUDA_VISIBLE_DEVICES the GPUs to share out (empty: none).
set -euo pipefail

usage() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; }
refuse() { printf 'launch/local.sh: error: %s\n' "$*" >&2; exit 2; }

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
case $1 in -h|--help) usage; exit 0 ;; esac
count=$1; shift
[[ $count =~ ^[1-9][0-9]*$ ]] || refuse "N=$count must be a whole number of processes, at least 1, and come first"
devices='' restarts=0 dry='' train=()
for argument in "$@"; do
  case $argument in
    --devices=*) devices=${argument#*=}
      [[ $devices =~ ^[1-9][0-9]*$ ]] || refuse "--devices=$devices must be a whole number, at least 1" ;;
    --restarts=*) restarts=${argument#*=}
      [[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts=$restarts must be a whole number" ;;
    --dry-run) dry=yes ;;
    --) ;;
    *) train+=("$argument") ;;
  esac
done
[[ ${#train[@]} -gt 0 ]] || refuse "the arguments of clipjax train are missing: --config=FILE --workdir=DIR"
read -ra clipjax <<<"${CLIPJAX:-clipjax}"
command -v "${clipjax[0]}" >/dev/null || refuse "there is no command ${clipjax[0]}; activate the environment it is in"

gpus=()
if [[ -z $devices && ${JAX_PLATFORMS:-} != cpu ]]; then
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
  fi
  [[ ${#gpus[@]} -eq 0 || $count -le ${#gpus[@]} ]] ||
    refuse "N=$count processes need a GPU each, but there are ${#gpus[@]}; give a smaller N, or --devices=M for CPUs"
fi
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
  return 1
}
command_of() {  # the command of process $1, in the array "full"
  full=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1")
  if [[ ${#gpus[@]} -gt 0 ]]; then full+=("CUDA_VISIBLE_DEVICES=${gpus[$1]}"); fi
  if [[ -n $devices ]]; then
    full+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  fi
  full+=("${clipjax[@]}" train "${train[@]}")
}

pids=() passed=''
pass_on() {
  passed=yes
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'pass_on TERM' TERM INT  # the processes agree on a step

run_all() {  # all ranks once; the exit code in "code"
  port=$(free_port) || refuse "no free port was found between 20000 and 32000"
  pids=()
  for ((rank = 0; rank < count; rank++)); do
    command_of "$rank"
    printf '+ %s\n' "$(printf '%q ' "${full[@]}")" >&2
    [[ -z $dry ]] || continue
    # A session of its own keeps the terminal's Ctrl-C from coming twice: a third signal ends a process unsaved.
    if [[ $rank -eq 0 ]]; then
      setsid "${full[@]}" </dev/null &
    else
      setsid "${full[@]}" </dev/null > >(sed -u "s/^/[rank $rank] /" >&2) 2>&1 &
    fi
    pids+=($!)
  done
  [[ -z $dry ]] || exit 0
  if [[ -n $passed ]]; then pass_on TERM; fi  # it came while they were being started

  code=0 deadline='' running=("${!pids[@]}")
  while [[ ${#running[@]} -gt 0 ]]; do
    left=() worst=0
    for rank in "${running[@]}"; do
      if kill -0 "${pids[$rank]}" 2>/dev/null; then left+=("$rank"); continue; fi
      result=0; wait "${pids[$rank]}" || result=$?
      if [[ $result -ne 0 && $code -eq 0 ]]; then
        printf 'launch/local.sh: rank %s left with exit code %s\n' "$rank" "$result" >&2
        if [[ $result -gt $worst ]]; then worst=$result; fi
      fi
    done
    if [[ $worst -ne 0 ]]; then code=$worst deadline=$((SECONDS + 60)); fi
    running=("${left[@]}")
    if [[ -n $deadline && $SECONDS -ge $deadline && ${#running[@]} -gt 0 ]]; then
      printf 'launch/local.sh: ending what is left: rank %s\n' "${running[*]}" >&2
      for rank in "${running[@]}"; do kill -KILL -- "-${pids[$rank]}" 2>/dev/null || true; done
      deadline=''
    fi
    if [[ ${#running[@]} -gt 0 ]]; then sleep 0.1 || true; fi
  done
}

for ((try = 0; ; try++)); do
  run_all
  case $code in 0|2|3|130|143) exit "$code" ;; esac
  if [[ -n $passed || $try -ge $restarts ]]; then exit "$code"; fi
  printf 'launch/local.sh: starting all ranks again after exit code %s (restart %s of %s)\n' \
    "$code" "$((try + 1))" "$restarts" >&2
done
