# shellcheck shell=bash
# The part of launch/tpu.sh that keeps a training going: `heal`. Read by tpu.sh, never run by itself.
#
# Once a minute it looks at the world and does the one thing that is missing: create, set up, run;
# or, after a failure, delete. All it must remember between two starts is a line in
# ~/.local/state/albert_jax/: for how many seconds the slice has been up, and when it was last seen.
# Every setup sends the checkout as it is then. Time is counted while the state is ACTIVE or READY, also while heal itself was away. What is begun
# is not broken off: the budget may be passed by a setup and the save at the end.

POLL_SECONDS=60
AT_ONCE_SECONDS=600 # a failure sooner than this after the start is one "at once"
FAILURES_ALLOWED=3  # so many of the same, at once and in a row, end it
BACKOFF_SECONDS=30  # before the next attempt, doubled up to ten minutes
SILENT_POLLS=10     # in a row without an answer from the workers: they are replaced

LEDGER='' USED=0 SEEN=0
WAS_UP=no ATTEMPTED=no STARTED=0 FAILING_SINCE=0 UNREACHED=0 BACKOFF=$BACKOFF_SECONDS
LAST_FAILURE='' REPEATED=0

check_heal() {
  [[ $BUDGET_HOURS =~ ^[0-9]{1,6}(\.[0-9]+)?$ && ! $BUDGET_HOURS =~ ^[0.]+$ ]] \
    || usage_error "--budget_hours='$BUDGET_HOURS': for how many hours in all may the slice be up?"
  [[ -n $BUCKET && " ${ARGS[*]} " == *" --workdir"[=\ ]"/bucket/"* ]] \
    || usage_error "heal deletes disks: give --bucket=B, and train a --workdir=/bucket/…"
}

command_heal() {
  say "heal $(resource), for at most $BUDGET_HOURS h"
  confirm "This creates $NAME in $ZONE, deletes and creates it again after failures, and deletes it at the end."
  if [[ $DRY_RUN == yes ]]; then
    look && delete && create && look && setup && run && ask_workers
    return
  fi
  trap 'say "heal stopped; $NAME in $ZONE is left as it is and may cost money. The same command goes on; or delete it."; exit 130' INT TERM
  read_ledger
  while true; do
    if look; then
      account
      over_budget && finish 1 "the budget of $BUDGET_HOURS h is used up; for more, raise --budget_hours (the time used is in $LEDGER)"
      heal_step
    else # a login that has run out, a network that is gone: it goes on when that is mended
      say "cannot see $NAME; IT MAY BE UP AND COST MONEY"
    fi
    sleep "$POLL_SECONDS"
  done
}

heal_step() {
  if is_up; then
    WAS_UP=yes
    tend
  elif [[ $STATE == GONE ]]; then
    make
  elif is_broken; then
    say "$NAME is $STATE"
    # Taken away is what spot is about; never made, again and again, is not.
    [[ $STATE != FAILED || $WAS_UP == yes ]] || count_failure 'request failed' 0
    remove
    back_off
  else
    say "$NAME is $STATE; waiting"
  fi
}

# --- Time and money --------------------------------------------------------------------------------

read_ledger() {
  LEDGER=${XDG_STATE_HOME:-$HOME/.local/state}/albert_jax/heal-${PROJECT:-default}-$ZONE-$NAME
  mkdir -p "$(dirname "$LEDGER")"
  [[ -e $LEDGER ]] || return 0
  read -r USED SEEN <"$LEDGER" || true
  [[ $USED$SEEN =~ ^[0-9]+$ ]] || die "$LEDGER is damaged; it holds the seconds used and the time last seen up."
  say "$NAME has been up for $(hours) h so far"
}

# Adds the time since the slice was last seen up, if it is up, and writes it down.
account() {
  local now
  now=$(date +%s)
  if is_up; then
    ((SEEN == 0)) || USED=$((USED + now - SEEN))
    SEEN=$now
  else
    SEEN=0
  fi
  echo "$USED $SEEN" >"$LEDGER.new"
  mv "$LEDGER.new" "$LEDGER"
}

hours() { awk "BEGIN { printf \"%.2f\", $USED / 3600 }"; }
over_budget() { awk "BEGIN { exit !($USED >= $BUDGET_HOURS * 3600) }"; }

# --- One thing at a time ---------------------------------------------------------------------------

make() {
  WAS_UP=no ATTEMPTED=no
  if create; then return; fi
  case $FAILURE in
    capacity) back_off ;;
    login | rights | type) finish 1 "that does not mend itself" ;;
    *) count_failure "create: $FAILURE" 0 && back_off ;;
  esac
}

# Looks after a slice that is up.
tend() {
  ask_workers || true
  [[ $TRAINING == unreachable ]] || UNREACHED=0
  [[ $TRAINING == failing* ]] || FAILING_SINCE=0
  case $TRAINING in
    running) [[ $ATTEMPTED == yes ]] || { ATTEMPTED=yes && STARTED=$(date +%s) && say "training runs"; } ;;
    idle) begin ;;
    done) if [[ $ATTEMPTED == yes ]]; then finish 0 "training is done"; else begin; fi ;;
    failed*) if [[ $ATTEMPTED == yes ]]; then training_failed "exit code ${TRAINING#* }"; else begin; fi ;;
    failing*) # some hosts have left, others may be writing a checkpoint
      ((FAILING_SINCE > 0)) || FAILING_SINCE=$(date +%s)
      (($(date +%s) - FAILING_SINCE < GRACE)) || training_failed "exit code ${TRAINING#* }"
      ;;
    unreachable) # the resource may be called ACTIVE for a while after its nodes were taken
      if grep -qE 'terminal state|NOT_FOUND' "$ERRORS"; then
        say "$NAME was taken away"
        remove
        back_off
      elif ((++UNREACHED == SILENT_POLLS)); then
        training_failed "workers do not answer ssh"
      fi
      ;;
  esac
}

begin() {
  ATTEMPTED=yes STARTED=$(date +%s)
  if setup && run; then return; fi
  training_failed "setup or start: $FAILURE"
}

training_failed() {
  say "training failed: $1"
  on_one 'tail -n 30 albert_jax_run/log' 2>/dev/null || true
  [[ $1 != "exit code 2" ]] || finish 1 "the arguments after -- are wrong; the reason stands above"
  count_failure "$1" $(($(date +%s) - STARTED))
  remove
  back_off
}

# count_failure WHAT SECONDS_RUN
count_failure() {
  if (($2 >= AT_ONCE_SECONDS)); then
    REPEATED=0 BACKOFF=$BACKOFF_SECONDS
  elif [[ $1 != "$LAST_FAILURE" ]]; then
    REPEATED=1
  else
    REPEATED=$((REPEATED + 1))
  fi
  LAST_FAILURE=$1
  ((REPEATED < FAILURES_ALLOWED)) || finish 1 "the same failure $REPEATED times at once ($1): that does not mend itself"
}

back_off() {
  say "next attempt in $BACKOFF s"
  sleep "$BACKOFF"
  BACKOFF=$((BACKOFF * 2 < 600 ? BACKOFF * 2 : 600))
}

remove() {
  local seconds
  account
  for seconds in 30 60 120 240 0; do
    if delete; then
      STATE=GONE
      account
      return
    fi
    sleep "$seconds"
  done
  die "$NAME in $ZONE cannot be deleted; IT MAY BE UP AND COST MONEY. Delete it in the console."
}

# finish EXIT_CODE WHY: nothing that costs is left behind.
finish() {
  say "$2"
  if [[ $STATE != GONE ]]; then
    [[ $1 == 0 ]] || ! is_up || stop || true
    remove
  fi
  say "$NAME was up for $(hours) h in all"
  [[ $1 != 0 ]] || rm -f "$LEDGER"
  exit "$1"
}
