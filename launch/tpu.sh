#!/usr/bin/env bash
# A command on every host of a TPU slice, started again until it has finished.
#   bash launch/tpu.sh run NAME OPTIONS -- python -m ig_jax.train --config=... --workdir=gs://BUCKET/NAME
#       creates the slice or uses the one that is there, installs this checkout, runs the command on all hosts, and
#       starts it again after exit 75 or a lost machine. The command outlives this script: call it again to go on watching.
#   bash launch/tpu.sh create|install|status|logs|stop|delete NAME OPTIONS
#   bash launch/tpu.sh fetch NAME OPTIONS -- FROM [TO]     a gs:// folder, or a file of the first host
# Options
#   --type=v5e:4x4     kind and topology, as preflight names them        --zone=us-west4-a
#   --capacity=spot    or standard, reserved, flex (instance groups)     --project=...  default: gcloud's
#   --api=...          mig: Compute Engine instance groups (default for v5p, v6e, tpu7x)
#                      queued: queued-resources (default for v5e), tpu-vm: tpu-vm create
#   --extras=gcs       extras of pyproject.toml beside "tpu"             --dry-run       prints every command, runs none
# Exit code: that of the command (0 finished, 2 bad input, 3 diverged, 1 a bug); 4 when two starts resume from one step.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "tpu.sh: error: $*" >&2; exit 2; }
say() { echo "tpu.sh: $(date +%H:%M:%S) $*" >&2; }
call() { # runs a command, and prints it
  printf '+'; printf ' %q' "$@"; echo
  [ -n "$dry" ] || "$@"
}
pause() { [ -n "$dry" ] || sleep "${POLL:-30}"; }

# --- what was asked for

action=${1:-}; name=${2:-}
type=v5e:4x4 zone=us-west4-a capacity=spot project='' api='' extras=gcs dry=''
[[ " create install run status logs fetch stop delete " == *" $action "* && -n "$action" && "$name" =~ ^[a-z][a-z0-9-]*$ ]] ||
  die "usage: launch/tpu.sh create|install|run|status|logs|fetch|stop|delete NAME [--type=v5e:4x4 ...] [-- COMMAND]"
shift 2
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; break ;;
    --dry-run) dry=yes ;;
    --type=* | --zone=* | --capacity=* | --project=* | --api=* | --extras=*) declare "${1#--}" ;;
    *) die "$1 is not an option" ;;
  esac
  shift
done
command=("$@")
[ "$action" != run ] || [ $# -gt 0 ] || die "run needs -- COMMAND"
[ "$action" != fetch ] || [ $# -gt 0 ] || die "fetch needs -- FROM [TO]"

kind=${type%%:*} topology=${type#*:} region=${zone%-*}
[[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "--type=$type must be a kind and a topology, such as v5e:4x4"
chips=$((${topology//x/*}))
case $kind in
  v5e) default=queued accelerator=v5litepod-$chips runtime=v2-alpha-tpuv5-lite machine=none ;;
  v5p) default=mig accelerator=v5p-$((2 * chips)) runtime=v2-alpha-tpuv5 machine=ct5p-hightpu-4t ;;
  v6e) default=mig accelerator=v6e-$chips runtime=v2-alpha-tpuv6e machine=ct6e-standard-4t ;;
  tpu7x) default=mig accelerator=none runtime=none machine=tpu7x-standard-4t ;;
  *) die "--type=$type must be of v5e, v5p, v6e, tpu7x" ;;
esac
api=${api:-$default}
[[ " mig queued tpu-vm " == *" $api "* ]] || die "--api=$api must be mig, queued or tpu-vm"
[[ " spot standard reserved flex " == *" $capacity "* ]] || die "--capacity=$capacity must be spot, standard, reserved or flex"
[ "$api" != mig ] || [ "$machine" != none ] || die "--api=mig has no $kind; use --api=queued"
[ "$api" = mig ] || [ "$runtime" != none ] || die "--api=$api has no $kind; use --api=mig"
[ "$api" = mig ] || [ "$capacity" != flex ] || die "--capacity=flex needs --api=mig"
hosts=$((chips > 4 ? chips / 4 : 1))
if [ "$api" != mig ] && [[ "$kind" == v[56]e ]] && [ "$chips" -le 8 ]; then hosts=1; fi
if [ -n "$dry" ]; then project=${project:-PROJECT}; fi
project=${project:-$(gcloud config get-value project 2>/dev/null)}
[ -n "$project" ] || die "--project is missing, and gcloud has none"
at=(--project="$project" --zone="$zone")
tpus=(gcloud compute tpus)
groups=(gcloud compute instance-groups managed)

# --- the slice: absent, waiting, ready, lost; unknown where Google did not answer

listing() { # what Google says of it, "" where it is not there
  local group states
  case $api in
    queued) "${tpus[@]}" queued-resources list "${at[@]}" --filter="name~/$name\$" --format='value(state.state)' ;;
    tpu-vm) "${tpus[@]}" tpu-vm list "${at[@]}" --filter="name~/$name\$" --format='value(state)' ;;
    mig)
      group=$("${groups[@]}" list --project="$project" --zones="$zone" --filter="name=$name" --format='value(name)') || return
      [ -n "$group" ] || return 0
      states=$("${groups[@]}" list-instances "$name" "${at[@]}" --format='value(instanceStatus)') || return
      if [ "$(grep -cx RUNNING <<< "$states")" -eq "$hosts" ]; then echo READY; else echo "${states:-no hosts yet}"; fi ;;
  esac
}

state() {
  local found
  found=$(listing) || found=unknown
  case $found in
    '') echo absent ;;
    ACTIVE | READY) echo ready ;;
    *PREEMPTED* | *TERMINATED* | *STOP* | *SUSPEND* | *FAILED*) echo lost ;;
    unknown) echo unknown ;;
    *) echo waiting ;;
  esac
}

create() {
  local flags=()
  if [ "$api" != mig ]; then
    [ "$capacity" = standard ] || flags=("--$capacity")
    case $api in
      queued) call "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${at[@]}" \
        --accelerator-type="$accelerator" --runtime-version="$runtime" "${flags[@]}" ;;
      tpu-vm) call "${tpus[@]}" tpu-vm create "$name" "${at[@]}" \
        --accelerator-type="$accelerator" --version="$runtime" "${flags[@]}" ;;
    esac
    return
  fi
  case $capacity in
    spot) flags=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    reserved) flags=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE) ;;
    flex) flags=(--provisioning-model=FLEX_START --instance-termination-action=DELETE --max-run-duration=7d) ;;
  esac
  # Policy and template may be left over from the last time; both are named by full paths, which the group demands.
  local policy=projects/$project/regions/$region/resourcePolicies/$name
  call gcloud compute resource-policies create workload-policy "$name" --project="$project" --region="$region" \
    --type=HIGH_THROUGHPUT --accelerator-topology="$topology" --accelerator-topology-mode=AUTO_CONNECT || true
  call gcloud compute instance-templates create "$name" --project="$project" --instance-template-region="$region" \
    --machine-type="$machine" --maintenance-policy=TERMINATE --image-project=ubuntu-os-accelerator-images \
    --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --boot-disk-size=200GB \
    --scopes=https://www.googleapis.com/auth/cloud-platform "${flags[@]}" || true
  # All hosts at once or none: a slice with a host missing hangs at its first use.
  call "${groups[@]}" create "$name" "${at[@]}" --size=0 --target-size-policy-mode=bulk \
    --template="projects/$project/regions/$region/instanceTemplates/$name" --workload-policy="$policy" \
    --default-action-on-vm-failure=do-nothing
  call "${groups[@]}" resize "$name" "${at[@]}" --size="$hosts"
}

delete() {
  case $api in
    queued) call "${tpus[@]}" queued-resources delete "$name" "${at[@]}" --force --quiet ;;
    tpu-vm) call "${tpus[@]}" tpu-vm delete "$name" "${at[@]}" --quiet ;;
    mig)
      call "${groups[@]}" delete "$name" "${at[@]}" --quiet
      call gcloud compute instance-templates delete "$name" --project="$project" --region="$region" --quiet
      call gcloud compute resource-policies delete "$name" --project="$project" --region="$region" --quiet ;;
  esac
}

was_ready=''
ready() { # returns once the slice is there; a lost one is replaced, as often as it takes
  while true; do
    local now=absent
    [ -n "$dry" ] || now=$(state)
    case $now in
      ready) was_ready=yes; return ;;
      absent) say "creating $name: $chips chips of $kind on $hosts hosts, $capacity"; create || [ -n "$was_ready" ] ;;
      lost) say "the slice was taken away; replacing it"; delete || true ;;
      *) say "waiting for $name ($now)" ;;
    esac
    [ -z "$dry" ] || return 0
    pause
  done
}

# --- its hosts

members() { # names of the machines of the instance group
  if [ -n "$dry" ]; then seq -f "$name-%g" 0 $((hosts - 1)); else
    "${groups[@]}" list-instances "$name" "${at[@]}" --format='value(name)' | sort
  fi
}

on_all() { # a shell command on all hosts at once
  if [ "$api" != mig ]; then
    call "${tpus[@]}" tpu-vm ssh "$name" "${at[@]}" --worker=all --command="$1"
    return
  fi
  local member running=() failed=0
  for member in $(members); do
    call gcloud compute ssh "$member" "${at[@]}" --command="$1" &
    running+=($!)
  done
  for member in "${running[@]}"; do wait "$member" || failed=$?; done
  return $failed
}

to_all() { # a file, to the home folder of all hosts
  if [ "$api" != mig ]; then
    call "${tpus[@]}" tpu-vm scp "$1" "$name:" "${at[@]}" --worker=all
    return
  fi
  local member
  for member in $(members); do call gcloud compute scp "$1" "$member:" "${at[@]}"; done
}

install() { # the tracked files of this checkout, with changes that are not committed
  local folder tree=''
  folder=$(mktemp -d)
  [ -n "$dry" ] || tree=$(git stash create)
  call git archive --format=tar.gz --output="$folder/ig_jax.tar.gz" "${tree:-HEAD}"
  to_all "$folder/ig_jax.tar.gz"
  rm -r "$folder"
  # The images have Python 3.10; uv brings a newer one.
  on_all "export PATH=\$HOME/.local/bin:\$PATH; mkdir -p ig_jax && tar -xzf ig_jax.tar.gz -C ig_jax && cd ig_jax &&
(command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh) && bash launch/setup.sh ${extras//,/ }"
}

# --- the command, as a unit of systemd: it outlives the connection, and a machine that is shut down sends it SIGTERM

start() {
  local quoted
  quoted=$(printf ' %q' "${command[@]}")
  on_all "[ \"\$(systemctl show ig_jax --property=SubState --value)\" = running ] || {
sudo systemctl stop ig_jax; sudo systemctl reset-failed ig_jax
sudo systemd-run --unit=ig_jax --uid=\$USER --remain-after-exit --property=WorkingDirectory=\$HOME/ig_jax \\
--property=TimeoutStopSec=300 --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \\
--property=StandardOutput=append:\$HOME/ig_jax.log --property=StandardError=inherit \\
--setenv=HOME=\$HOME --setenv=PATH=\$HOME/ig_jax/.venv/bin:\$PATH /usr/bin/env$quoted; } 2>&1"
}

report="(. <(systemctl show ig_jax --property=SubState,Result,ExecMainStatus); echo ig_jax-is \$SubState \$Result \$ExecMainStatus)"

outcome() { # running, finished, again, failed CODE, or unreachable; from what all hosts say of the unit
  local said code
  said=$(on_all "$report" 2>/dev/null | grep -v '^+' | grep -o 'ig_jax-is .*' || true)
  if [ "$(grep -c . <<< "$said")" -ne "$hosts" ]; then echo unreachable
  elif grep -q 'is running' <<< "$said"; then echo running
  elif [ "$(grep -c 'exited success 0' <<< "$said")" -eq "$hosts" ]; then echo finished
  elif code=$(grep -om1 'exit-code [123]$' <<< "$said"); then echo "failed ${code#* }"
  else echo again; fi
}

watch() { # returns once no host runs the command any more, with the outcome; silence alone is no reason to act
  local now
  while now=$(outcome); [ "$now" = running ] || [ "$now" = unreachable ]; do
    if [ "$now" = unreachable ]; then
      case $(state) in lost | absent | waiting) echo lost; return ;; esac
      say "not every host answers"
    fi
    pause
  done
  echo "$now"
}

newest_step() { # the newest step in the bucket of the run; another answer each time where there is no bucket
  local argument
  for argument in "${command[@]}"; do
    [[ "$argument" == --workdir=gs://* ]] || continue
    gcloud storage ls "${argument#--workdir=}/checkpoints/" 2>/dev/null | grep -oE '[0-9]+/$' | tr -d / | sort -n | tail -1 |
      grep . || echo "no step"
    return
  done
  echo "$SECONDS s"
}

run() {
  local ended step before=''
  while true; do
    ready
    if [ -n "$dry" ]; then
      install; start; on_all "$report"
      say "and after a lost machine, before all of this again:"
      delete
      return
    fi
    if [ "$(outcome)" != running ]; then
      if ! { install && start; }; then say "a host did not start; trying again"; pause; continue; fi
    fi
    say "running on $hosts hosts; look with: bash launch/tpu.sh logs $name --type=$type --zone=$zone --api=$api"
    ended=$(watch)
    say "ended: $ended"
    case $ended in
      finished) return 0 ;;
      failed*) logs || true; exit "${ended#* }" ;;
      lost) delete || true; continue ;;
    esac
    step=$(newest_step)
    if [ "$step" = "$before" ]; then
      say "two starts in a row ended at $step; a third would do the same"
      logs || true
      exit 4
    fi
    before=$step
  done
}

logs() { on_all "tail -n ${LINES_OF_LOG:-30} ig_jax.log"; }

fetch() {
  if [[ "$1" == gs://* ]]; then call gcloud storage cp --recursive "$1" "${2:-.}"
  elif [ "$api" = mig ]; then call gcloud compute scp --recurse "$(members | head -1):$1" "${2:-.}" "${at[@]}"
  else call "${tpus[@]}" tpu-vm scp --recurse "$name:$1" "${2:-.}" "${at[@]}" --worker=0; fi
}

case $action in
  create) ready ;;
  install | run | logs | delete) $action ;;
  stop) on_all "sudo systemctl stop ig_jax" ;;
  status) [ -n "$dry" ] || say "slice: $(state)"; on_all "$report" ;;
  fetch) fetch "${command[@]}" ;;
esac
