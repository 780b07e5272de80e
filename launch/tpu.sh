#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one host, a whole slice, or several slices, on demand or spot.
#
#   launch/tpu.sh create --name=N --zone=Z --type=T [--slices=K] [--spot] [--plain] [--version=V]
#   launch/tpu.sh setup  --name=N --zone=Z [--bucket=B]       installs this checkout on every worker
#   launch/tpu.sh run    --name=N --zone=Z -- TRAIN_ARG…      python -m albert_jax.train TRAIN_ARG…
#   launch/tpu.sh status --name=N --zone=Z                    state, workers, exit codes, metrics
#   launch/tpu.sh logs   --name=N --zone=Z [--worker=W] [--slice=S]
#   launch/tpu.sh ssh    --name=N --zone=Z [--worker=W] [--slice=S]
#   launch/tpu.sh stop   --name=N --zone=Z [--grace_seconds=S]    training saves and leaves
#   launch/tpu.sh delete --name=N --zone=Z [--yes]
#   launch/tpu.sh heal   --name=N --zone=Z --type=T --bucket=B --budget_hours=H [create's] -- TRAIN_ARG…
#
# heal creates, sets up and runs; after a preemption or a failure it deletes what is left and does so
# again, until training exits 0, the slice has been up for H hours in all, training exits 2 (its
# command line is wrong), or the same failure came three times at once. It ends with the slice
# deleted. It can be stopped (Ctrl-C: the slice stays) and started again at any time.
#
# Options
#   --name=N           of the resource; its nodes are N, or N-0 N-1 … with several slices
#   --zone=Z           for example us-west4-a; --project=P where gcloud's own project is not meant
#   --type=T           v5litepod-{1,4,8,…,256} and v6e-{1,4,8,…,256} count chips;
#                      v4-{8,…,8192} and v5p-{8,…,12288} count cores, two a chip
#   --slices=K         slices of that type that train together over the data-centre network
#   --spot             cheaper, and taken away at any time: for heal
#   --plain            a TPU VM at once or not at all, instead of a place in the queue
#   --version=V        runtime version; by default what Google names for the generation
#   --bucket=B         Cloud Storage bucket, seen as /bucket on every worker: for the token store and
#                      --workdir. Take one with hierarchical namespace, where renames are atomic
#   --grace_seconds=S  how long stop waits for the save (600)
#   --dry_run          prints every command instead of running it
#   --yes              asks nothing
#
# Time: create takes minutes, or days in the queue; setup 5 to 10 minutes; run and stop a minute.
# MONEY: every chip costs from the moment the state is ACTIVE (READY with --plain) until `delete`,
# whether it trains or not. Queued requests cost nothing. The bucket and its traffic cost a little.
#
# Exit codes: 0 done, 1 it could not be done, 2 the command line is wrong.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME='' ZONE='' PROJECT='' TYPE='' SLICES=1 SPOT=no VERSION=''
WORKER=0 SLICE=0 GRACE=600 BUDGET_HOURS=''
KIND=queued-resources # or tpu-vm: the gcloud group that knows this resource
STATE=UNKNOWN         # as gcloud tells it, or GONE
ADDRESS=''            # the options that name the resource, for the commands in messages
COMMANDS=(create setup run status logs ssh stop delete heal)
OPTIONS=(name=NAME zone=ZONE project=PROJECT type=TYPE slices=SLICES version=VERSION bucket=BUCKET
  worker=WORKER slice=SLICE grace_seconds=GRACE budget_hours=BUDGET_HOURS)
FLAGS=(spot=SPOT=yes plain=KIND=tpu-vm dry_run=DRY_RUN=yes yes=YES=yes)
PROGRAM=train
# shellcheck source=launch/command.sh
source "$HERE/command.sh"
# shellcheck source=launch/errors.sh
source "$HERE/errors.sh"
# shellcheck source=launch/heal.sh
source "$HERE/heal.sh"

# --- The command line ---------------------------------------------------------------------------

check() {
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,58}[a-z0-9])?$ ]] \
    || usage_error "--name='$NAME': 1 to 60 of a-z, 0-9 and -, a letter first, no - last"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-(ai[0-9]+)?[a-z]$ ]] \
    || usage_error "--zone='$ZONE' is no zone; one is us-west4-a, europe-west4-b, us-central2-b"
  [[ $PROJECT =~ ^([a-z][-a-z0-9.:]{4,}[a-z0-9])?$ ]] || usage_error "--project='$PROJECT' is no project id"
  [[ $BUCKET =~ ^([a-z0-9][-a-z0-9_.]{1,61}[a-z0-9])?$ ]] \
    || usage_error "--bucket='$BUCKET' is no bucket name (without gs:// and folders)"
  ADDRESS="--name=$NAME --zone=$ZONE${PROJECT:+ --project=$PROJECT}"
  check_number --slices "$SLICES" 1
  check_number --worker "$WORKER" 0
  check_number --slice "$SLICE" 0
  check_number --grace_seconds "$GRACE" 1
  case $COMMAND in
    create | heal)
      check_type
      [[ $SLICES == 1 || $KIND == queued-resources ]] || usage_error "--plain makes one slice; leave it out with --slices=$SLICES"
      ;;
  esac
  case $COMMAND in
    run | heal) check_args yes ;;
    *) check_args no ;;
  esac
  [[ $COMMAND != heal ]] || check_heal
}

check_number() {
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ && $2 -ge $3 ]] || usage_error "$1='$2': a whole number from $3"
}

# The sizes that there are, and the runtime version that goes with the generation.
check_type() {
  local size=${TYPE##*-} sizes version most=0
  case $TYPE in
    v4-*) sizes='8 16 32 64' most=8192 version=tpu-ubuntu2204-base ;;
    v5litepod-*) sizes='1 4 8 16 32 64 128 256' version=v2-alpha-tpuv5-lite ;;
    v5p-*) sizes='8 16 32 64' most=12288 version=v2-alpha-tpuv5 ;;
    v6e-*) sizes='1 4 8 16 32 64 128 256' version=v2-alpha-tpuv6e ;;
    *) usage_error "--type='$TYPE' is not known; types are v4-N, v5litepod-N, v5p-N and v6e-N" ;;
  esac
  [[ $size =~ ^[1-9][0-9]{0,5}$ && $TYPE == "${TYPE%%-*}-$size" ]] || size=0
  [[ " $sizes " == *" $size "* ]] || ((size > 0 && size <= most && size % 128 == 0)) \
    || usage_error "--type='$TYPE': no such size; there are $sizes$( ((most == 0)) || echo " and multiples of 128 to $most")"
  VERSION=${VERSION:-$version}
}

# Chips of one slice.
chips() {
  case $TYPE in
    v[234]-* | v5p-*) echo $((${TYPE##*-} / 2)) ;;
    *) echo "${TYPE##*-}" ;;
  esac
}

several_hosts() {
  local most=8
  case $TYPE in v4-* | v5p-*) most=4 ;; esac
  ((SLICES > 1 || ${TYPE:+$(chips)} + 0 > most))
}

# The resource in words, for all that costs or destroys.
resource() {
  local words="$NAME in $ZONE${PROJECT:+ (project $PROJECT)}"
  if [[ -n $TYPE ]]; then
    words+=": $SLICES x $TYPE = $((SLICES * $(chips))) chips"
    [[ $SPOT == no ]] || words+=', spot'
  fi
  echo "$words"
}

# --- gcloud and ssh ------------------------------------------------------------------------------

# tpu GROUP VERB [ARG…]: in this resource's zone and project.
tpu() {
  perform gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

# The nodes: each slice is one, made of workers. (gcloud could reach all of them through the queued
# resource in one command, but that one passes over nodes it cannot reach, and still exits with 0.)
nodes() {
  local slice
  ((SLICES > 1)) || echo "$NAME"
  for ((slice = 0; SLICES > 1 && slice < SLICES; slice++)); do echo "$NAME-$slice"; done
}

# each_node FUNCTION [ARG…]: FUNCTION NODE ARG… for all nodes, side by side; fails where one fails.
each_node() {
  local node job jobs=() failed=0 APPEND=yes
  : >"$ERRORS"
  for node in $(nodes); do
    "$1" "$node" "${@:2}" &
    jobs+=($!)
    [[ $DRY_RUN == no ]] || wait $!
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return $failed
}

ssh_to() { tpu tpu-vm ssh "$1" --worker=all --command="$2"; }
copy_to() { tpu tpu-vm scp "$2" "$1:albert_jax.tgz" --worker=all; }

# A shell command on all workers, or on --worker of --slice.
on_all() { each_node ssh_to "$1"; }
on_one() { tpu tpu-vm ssh "$(chosen_node)" --worker="$WORKER" --command="$1"; }
chosen_node() { nodes | sed -n "$((SLICE + 1))p"; }

# Runs a command up to five times as long as it is ssh that fails: a new VM refuses it for a while.
patiently() {
  local seconds
  for seconds in 5 15 45 90 0; do
    ! "$@" || return 0
    ((seconds > 0)) && ssh_lost || return 1
    say "ssh lost; trying again in $seconds s"
    sleep "$seconds"
  done
}

# Sets STATE (GONE where there is nothing of this name and kind), and TYPE and SLICES as they are.
look() {
  local fields='state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec.len(),tpu.nodeSpec[0].multisliceParams.nodeCount'
  local found type='' specs='' slices=''
  [[ $KIND == queued-resources ]] || fields=state,acceleratorType
  if [[ $DRY_RUN == yes ]]; then
    tpu "$KIND" describe "$NAME" --format="csv[no-heading]($fields)"
    STATE=ACTIVE
  elif found=$(tpu "$KIND" describe "$NAME" --format="csv[no-heading]($fields)" 2>/dev/null); then
    IFS=, read -r STATE type specs slices <<<"$found"
    [[ -z $TYPE || -z $type || $TYPE == "$type" ]] || die "$NAME in $ZONE is a $type, not a $TYPE; choose another --name, or delete it."
    TYPE=${type:-$TYPE}
    slices=${slices:-$specs} # several are told as a count or, once they are there, as a spec each
    ((${slices:-0} == 0)) || SLICES=$slices
  elif not_found; then
    STATE=GONE
  else
    STATE=UNKNOWN
    cat "$ERRORS" >&2
    explain
  fi
}

is_up() { [[ $STATE == ACTIVE || $STATE == READY ]]; }
is_broken() { [[ $STATE =~ ^(FAILED|SUSPENDED|PREEMPTED|TERMINATED|STOPPED)$ ]]; }

# As look, and also finds what was made with --plain; ends where there is nothing.
find_it() {
  look || exit 1
  if [[ $STATE == GONE && $KIND == queued-resources ]]; then
    KIND=tpu-vm
    look || exit 1
  fi
  [[ $STATE != GONE ]] || die "there is no $NAME in $ZONE; check --name, --zone and --project, or create it."
}

require_up() {
  find_it
  ((SLICE < SLICES)) || usage_error "--slice=$SLICE: $NAME has $SLICES, counted from 0"
  ! is_broken || die "$NAME in $ZONE is $STATE: taken away or never made. Delete it and create it again, or let heal do that."
  is_up || die "$NAME in $ZONE is $STATE, not up yet. Wait: launch/tpu.sh status $ADDRESS"
}

# --- The commands --------------------------------------------------------------------------------

create() {
  local arguments=(--accelerator-type="$TYPE")
  say "create $(resource). It costs from the moment it is up until: launch/tpu.sh delete $ADDRESS"
  if [[ $KIND == tpu-vm ]]; then
    arguments+=(--version="$VERSION")
  elif [[ $SLICES == 1 ]]; then
    arguments+=(--runtime-version="$VERSION" --node-id="$NAME")
  else
    arguments+=(--runtime-version="$VERSION" --node-count="$SLICES" --node-prefix="$NAME")
  fi
  [[ $SPOT == no ]] || arguments+=(--spot)
  tpu "$KIND" create "$NAME" "${arguments[@]}" || explain
}

command_create() {
  local before=''
  create || exit 1
  while true; do
    look || say "cannot see $NAME; it may come up and cost money"
    [[ $STATE == "$before" ]] || say "$NAME is $STATE"
    before=$STATE
    ! is_up || break
    if is_broken || [[ $STATE == GONE ]]; then
      die "$NAME was preempted or given up while it was being created ($STATE). Delete it (launch/tpu.sh \
delete $ADDRESS) and create it again, in another --zone or without --spot; or let heal try on. \
Why: gcloud compute tpus $KIND describe $NAME --zone=$ZONE"
    fi
    sleep 30 # Ctrl-C is safe: the request stays in the queue
  done
  say "next: launch/tpu.sh setup $ADDRESS${BUCKET:+ --bucket=$BUCKET}"
}

# Sends the parts of the checkout that training needs, and has every worker install them.
setup() {
  local folder=.
  say "setup $(resource)${BUCKET:+, bucket gs://$BUCKET at /bucket}"
  [[ $DRY_RUN == yes ]] || folder=$TEMP
  # What is not tracked comes along: a new config is there to be tried.
  if COPYFILE_DISABLE=1 perform tar -C "$HERE/.." --exclude=__pycache__ -czf "$folder/albert_jax.tgz" \
    albert_jax configs launch pyproject.toml requirements.txt README.md LICENSE \
    && patiently each_node copy_to "$folder/albert_jax.tgz" \
    && patiently on_all "mkdir -p albert_jax && tar -xzf albert_jax.tgz -C albert_jax && albert_jax/launch/worker.sh setup $BUCKET"; then
    return
  fi
  explain_workers
}

command_setup() {
  require_up
  setup || exit 1
  say "next: launch/tpu.sh run $ADDRESS -- --config=… --workdir=…"
}

# Asks all workers. Sets REPORT to their lines, and TRAINING to running, done, idle (none started),
# failed CODE, failing CODE (some still run) or unreachable, and then fails.
ask_workers() {
  local codes
  TRAINING=idle
  if ! REPORT=$(on_all "albert_jax/launch/worker.sh status 2>/dev/null || echo worker=\$(hostname) state=bare" 2>/dev/null); then
    TRAINING=unreachable
    return 1
  fi
  codes=$(sed -n 's/.* state=exited code=//p' <<<"$REPORT" | sort -u)
  if grep -qvx 0 <<<"${codes:-0}"; then
    # The code of a wrong command line outranks those of the hosts that fell with it.
    TRAINING="failed $(grep -x 2 <<<"$codes" || grep -vxm 1 0 <<<"$codes")"
  elif [[ $codes == 0 ]] && ! grep -qE ' state=(none|bare)' <<<"$REPORT"; then
    TRAINING='done'
  fi
  if grep -q ' state=running' <<<"$REPORT"; then
    [[ $TRAINING == failed* ]] && TRAINING="failing ${TRAINING#* }" || TRAINING=running
  fi
}

# Starts the training on all workers, unless one runs there.
run() {
  local command
  say "run on $(resource): python -m albert_jax.train ${ARGS[*]}"
  if several_hosts && [[ " ${ARGS[*]}" != *" --workdir"[=\ ]"/bucket/"* ]]; then
    say "warning: all hosts must see one workdir, and no --workdir=/bucket/… is given (setup --bucket=B)"
  fi
  patiently ask_workers || explain_silence || return
  [[ $TRAINING != running && $TRAINING != failing* ]] \
    || refuse "training runs on $NAME already. Watch it (logs), or end it (stop) first" running || return
  ! grep -q ' state=bare' <<<"$REPORT" \
    || refuse "$NAME is not set up: launch/tpu.sh setup $ADDRESS" bare || return
  # One id for all attempts: a worker that has started says so when it is asked again.
  command="albert_jax/launch/worker.sh start $(date +%s)-$$$(printf ' %q' "${ARGS[@]}")"
  patiently on_all "$command" || explain_workers
}

command_run() {
  require_up
  if ! run; then
    say "where some workers have started and others not: launch/tpu.sh stop $ADDRESS, then run again"
    exit 1
  fi
  say "next: launch/tpu.sh logs $ADDRESS"
}

command_status() {
  find_it
  say "$(resource): $STATE"
  is_up || return 0
  patiently ask_workers || explain_silence || exit 1
  grep '^worker=' <<<"$REPORT" | sort || true
  grep '^metrics=' <<<"$REPORT" | tail -n 1 || true
  say "training: $TRAINING"
}

command_logs() {
  require_up
  on_one 'albert_jax/launch/worker.sh logs' || explain_workers || exit 1
}

command_ssh() {
  local command
  require_up
  command=(gcloud compute tpus tpu-vm ssh "$(chosen_node)" --worker="$WORKER" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"})
  if [[ $DRY_RUN == yes ]]; then
    perform "${command[@]}"
  else
    "${command[@]}" # without the pipes of perform, which a terminal does not like
  fi
}

stop() {
  say "stop training on $(resource); it has $GRACE s to save"
  patiently on_all "albert_jax/launch/worker.sh stop $GRACE" || explain_workers
}

command_stop() {
  require_up
  stop || exit 1
  say "$NAME is still up and costs: launch/tpu.sh delete $ADDRESS"
}

delete() {
  local force=()
  [[ $KIND == tpu-vm ]] || force=(--force) # its nodes too
  say "delete $(resource)"
  tpu "$KIND" delete "$NAME" ${force[@]+"${force[@]}"} && return
  ! not_found || return 0 # gone by itself
  explain
}

command_delete() {
  find_it
  confirm "Delete $(resource), now $STATE? What is on its disks is lost; a bucket is not touched."
  delete || die "$NAME is still there, and costs money if it is up. Try again, or delete it in the console."
}

main "$@"
