#!/usr/bin/env bash
# clipjax train on all hosts of a TPU VM pod, by gcloud. JAX finds the processes of a pod by itself.
#
#   launch/tpu/pod.sh create  NAME --zone=ZONE --type=v5litepod-64 --version=RUNTIME [--queued] [--spot] [--dry-run]
#   launch/tpu/pod.sh setup   NAME --zone=ZONE --source=URL_OF_CLIPJAX [--dry-run]
#   launch/tpu/pod.sh copy    NAME --zone=ZONE [--dry-run] PATH...     configs, tokenizers: to the home of all hosts
#   launch/tpu/pod.sh train   NAME --zone=ZONE [--dry-run] --config=FILE[:ARG] --workdir=gs://... [clipjax train ...]
#   launch/tpu/pod.sh stop    NAME --zone=ZONE [--dry-run]      SIGTERM to the processes: they save and leave
#   launch/tpu/pod.sh delete  NAME --zone=ZONE [--queued] [--dry-run]
#
#   --queued   as a queued resource, which waits until the chips are there (gcloud ... queued-resources)
#   --dry-run  print the gcloud command and run nothing
#
# The workdir is gs://BUCKET/RUN, which the pod's service account may write to; data that is read by path must be there
# on all hosts. After a preemption create the pod again, then the same train command.
set -euo pipefail

usage() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; }
refuse() { printf 'launch/tpu/pod.sh: error: %s\n' "$*" >&2; exit 2; }

case ${1:-} in -h|--help|'') usage; exit 0 ;; esac
action=$1; shift
case $action in  # and what it takes
  create) takes='zone type version queued spot' ;;
  setup) takes='zone source' ;;
  delete) takes='zone queued' ;;
  copy|train|stop) takes=zone ;;
  *) refuse "$action is none of create, setup, copy, train, stop, delete" ;;
esac
name=${1:-}
[[ -n $name && $name != -* ]] || refuse "the pod's NAME must follow $action"
shift
zone='' type='' version='' source='' queued='' spot='' dry='' rest=()
for argument in "$@"; do
  option=${argument%%=*}
  case $option in
    --zone|--type|--version|--source|--queued|--spot)
      [[ " $takes " == *" ${option#--} "* ]] || refuse "$option is not an option of $action; it takes --${takes// /, --}" ;;
  esac
  case $argument in
    --zone=*) zone=${argument#*=} ;;
    --type=*) type=${argument#*=} ;;
    --version=*) version=${argument#*=} ;;
    --source=*) source=${argument#*=} ;;
    --queued) queued=yes ;;
    --spot) spot=--spot ;;
    --dry-run) dry=yes ;;
    *) [[ $action == train || $action == copy ]] || refuse "unknown argument $argument for $action"
       rest+=("$argument") ;;
  esac
done
[[ -n $zone ]] || refuse "--zone=ZONE is missing"
run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  [[ -z $dry ]] || return 0
  command -v gcloud >/dev/null || refuse "gcloud is not installed; see the Google Cloud CLI's install page"
  "$@"
}
on_all() { run gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$1"; }

case $action in
  create)
    [[ -n $type && -n $version ]] || refuse "create needs --type=ACCELERATOR_TYPE and --version=RUNTIME"
    if [[ -n $queued ]]; then
      run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--zone=$zone" \
        "--accelerator-type=$type" "--runtime-version=$version" ${spot:+"$spot"}
    else
      run gcloud compute tpus tpu-vm create "$name" "--zone=$zone" "--accelerator-type=$type" "--version=$version" \
        ${spot:+"$spot"}
    fi ;;
  setup)
    [[ -n $source ]] || refuse "setup needs --source=URL, what pip installs clipjax from"
    on_all "python3 -m venv clipjax-env && clipjax-env/bin/pip install $(printf '%q' "clipjax[tpu] @ $source")" ;;
  copy)
    [[ ${#rest[@]} -gt 0 ]] || refuse "name what to copy: copy NAME --zone=ZONE PATH..."
    run gcloud compute tpus tpu-vm scp --recurse "${rest[@]}" "$name:" "--zone=$zone" --worker=all ;;
  train)
    [[ ${#rest[@]} -gt 0 ]] || refuse "the arguments of clipjax train are missing: --config=FILE --workdir=DIR"
    on_all "clipjax-env/bin/clipjax train $(printf '%q ' "${rest[@]}")" ;;
  stop) on_all "pkill -TERM -f '[c]lipjax train'" ;;
  delete)
    if [[ -n $queued ]]; then
      run gcloud compute tpus queued-resources delete "$name" "--zone=$zone" --force
    else
      run gcloud compute tpus tpu-vm delete "$name" "--zone=$zone"
    fi ;;
esac
