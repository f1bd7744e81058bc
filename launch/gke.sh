#!/usr/bin/env bash
# A command on every host of a TPU slice of a GKE cluster, started again by JobSet until it has finished.
#   bash launch/gke.sh submit NAME --image=IMAGE [--type=v5e:4x4] -- python -m ig_jax.train --config=... --workdir=gs://BUCKET/NAME
#   bash launch/gke.sh xpk NAME --image=IMAGE --cluster=CLUSTER [--type=v5e:4x4] -- COMMAND     the same through xpk
#   bash launch/gke.sh image IMAGE [--extras=tpu,gcs]      builds launch/Dockerfile and pushes it
#   bash launch/gke.sh status|logs|delete NAME
# --dry-run prints every command and the JobSet, and runs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "gke.sh: error: $*" >&2; exit 2; }
call() { # runs a command, and prints it
  printf '+'; printf ' %q' "$@"; echo
  [ -n "$dry" ] || "$@"
}

action=${1:-} name=${2:-}
type=v5e:4x4 image='' cluster='' extras=tpu,gcs dry=''
[[ " submit xpk image status logs delete " == *" $action "* && -n "$action" && -n "$name" ]] ||
  die "usage: launch/gke.sh submit|xpk|image|status|logs|delete NAME [--image=... --type=v5e:4x4] [-- COMMAND]"
shift 2
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; break ;;
    --dry-run) dry=yes ;;
    --type=* | --image=* | --cluster=* | --extras=*) declare "${1#--}" ;;
    *) die "$1 is not an option" ;;
  esac
  shift
done

topology=${type#*:}
[[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "--type=$type must be a kind and a topology, such as v5e:4x4"
chips=$((${topology//x/*}))
case ${type%%:*} in
  v5e) accelerator=tpu-v5-lite-podslice device=v5litepod-$chips ;;
  v5p) accelerator=tpu-v5p-slice device=v5p-$((2 * chips)) ;;
  v6e) accelerator=tpu-v6e-slice device=v6e-$chips ;;
  tpu7x) accelerator=tpu7x device=tpu7x-$((2 * chips)) ;;
  *) die "--type=$type must be of v5e, v5p, v6e, tpu7x" ;;
esac
hosts=$((chips > 4 ? chips / 4 : 1))

jobset() { # the filled-in JobSet; the command as a list of YAML
  local command
  command=$(printf '"%s", ' "$@")
  sed -e "s|\${NAME}|$name|; s|\${HOSTS}|$hosts|; s|\${ACCELERATOR}|$accelerator|; s|\${TOPOLOGY}|$topology|" \
    -e "s|\${IMAGE}|$image|; s|\${CHIPS}|$((chips / hosts))|; s|\${COMMAND}|[${command%, }]|" launch/gke_jobset.yaml
}

case $action in
  submit | xpk)
    [ -n "$image" ] || die "--image is missing; make one with: bash launch/gke.sh image IMAGE"
    [ $# -gt 0 ] || die "$action needs -- COMMAND"
    [[ "$*" != *[\"\\\|\&]* ]] || die "the command must be without quotes, backslashes, | and &" ;;
esac
case $action in
  image)
    call docker build --file=launch/Dockerfile --build-arg=EXTRAS="$extras" --tag="$name" .
    call docker push "$name" ;;
  submit)
    jobset "$@"
    [ -n "$dry" ] || jobset "$@" | kubectl apply --filename=-
    [ -z "$dry" ] || call kubectl apply --filename=- ;;
  xpk)
    [ -n "$cluster" ] || die "--cluster is missing"
    # xpk restarts on 42 and 127 to 255 by itself; 75 is a saved stop, 70 a lost peer.
    call xpk workload create --cluster="$cluster" --workload="$name" --docker-image="$image" --tpu-type="$device" \
      --num-slices=1 --max-restarts=50 --restart-on-exit-codes=70,75 --termination-grace-period-seconds=180 \
      --command="$*" ;;
  status) call kubectl get jobset,pods --selector="jobset.sigs.k8s.io/jobset-name=$name" ;;
  logs) call kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --tail=30 --prefix --max-log-requests=64 ;;
  delete) call kubectl delete jobset "$name" ;;
esac
