#!/usr/bin/env bash
# Runs on every TPU worker, called over ssh by launch/tpu.sh: sets up, starts, watches, stops.
#
#   worker.sh setup [BUCKET]        makes .venv and installs the package; mounts BUCKET at /bucket.
#                                   5 to 10 minutes the first time, seconds after that
#   worker.sh start RUN TRAIN_ARG…  starts `python -m albert_jax.train TRAIN_ARG…`, detached from
#                                   the connection; refuses while another run is on. The same RUN
#                                   again is no error, so that a lost connection can be tried again
#   worker.sh status                one line: worker=HOST state=running | exited code=N | none;
#                                   and metrics={…}, the last line of the run's metrics.jsonl
#   worker.sh logs                  the end of the log, and what is added to it while training runs
#   worker.sh stop SECONDS          SIGTERM (training saves and leaves), then waits
#
# ~/albert_jax_run holds what is known of the last run: run, workdir, pid, log, exit_code, and a lock
# that is held as long as the run lives; so neither a dropped connection, nor a reboot, nor a process
# id used again can make a dead run look alive.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$ROOT/.venv/bin/python
STATE=$HOME/albert_jax_run
MOUNT=/bucket
UV_VERSION=0.13.9
GCSFUSE_VERSION=3.8.0

main() {
  [[ $# -gt 0 ]] || fail "usage: worker.sh setup|start|status|logs|stop"
  mkdir -p "$STATE"
  case $1 in
    setup | start | status | logs | stop | supervise) "$@" ;;
    *) fail "no command $1; there are setup, start, status, logs and stop" ;;
  esac
}

fail() {
  echo "$(hostname): $*" >&2
  exit 1
}

running() { [[ -e $STATE/lock ]] && ! flock --nonblock "$STATE/lock" true; }

setup() {
  ! running || fail "training runs here; stop it before setting up again"
  # uv brings a Python of its own: the images of TPU VMs have 3.10, which is too old for this JAX.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user "uv==$UV_VERSION"
  [[ -x $PYTHON ]] || python3 -m uv venv --quiet --python '>=3.11,<3.14' "$ROOT/.venv"
  python3 -m uv pip install --quiet --python "$PYTHON" --editable "${ROOT}[tpu]"
  if [[ -n ${1:-} ]]; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    echo "$1" >"$STATE/bucket"
    mount_bucket
  fi
  echo "$(hostname): set up"
}

install_gcsfuse() {
  local package=/tmp/gcsfuse.deb
  curl --fail --silent --show-error --location --retry 5 --output "$package" \
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE_VERSION/gcsfuse_${GCSFUSE_VERSION}_amd64.deb"
  # A new VM updates itself for some minutes and holds the lock of the package system meanwhile.
  sudo apt-get --quiet --yes -o DPkg::Lock::Timeout=600 install "$package"
}

# Mounts the bucket that setup was given, where it is not mounted (after setup, or a reboot).
mount_bucket() {
  [[ -e $STATE/bucket ]] && ! mountpoint --quiet "$MOUNT" || return 0
  local bucket
  bucket=$(<"$STATE/bucket")
  sudo mkdir -p "$MOUNT"
  sudo chown "$(id -u):$(id -g)" "$MOUNT"
  # metadata TTL 0: every host sees at once what another wrote; on TPU machines the default is "for
  #   ever", and a host would not find a checkpoint that process 0 has just committed.
  # rename-dir-limit: a checkpoint becomes whole by the renaming of its folder.
  # no streaming writes: only then does fsync put a file that is still open into the bucket.
  # file cache: the token store is read at random places; whole files are brought to the local disk.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --rename-dir-limit=200000 --enable-streaming-writes=false --cache-dir="$HOME/.cache/gcsfuse" \
    --file-cache-max-size-mb=50000 --file-cache-cache-file-for-range-read "$bucket" "$MOUNT" \
    || fail "cannot mount gs://$bucket; does it exist, and may the VM's service account use it (role Storage Object User)?"
}

start() {
  local run=$1 attempt
  shift
  if running; then
    [[ $(cat "$STATE/run" 2>/dev/null) == "$run" ]] || fail "training runs already; stop it first"
    echo "$(hostname): started already"
    return
  fi
  [[ -x $PYTHON ]] || fail "not set up: no $PYTHON; run setup first"
  mount_bucket
  rm -f "$STATE/pid" "$STATE/exit_code"
  [[ ! -e $STATE/log ]] || mv "$STATE/log" "$STATE/log.previous"
  echo "$run" >"$STATE/run"
  workdir_of "$@" >"$STATE/workdir"
  setsid "${BASH_SOURCE[0]}" supervise "$@" </dev/null >"$STATE/log" 2>&1 &
  for ((attempt = 0; attempt < 100; attempt++)); do
    [[ ! -s $STATE/pid ]] || break
    sleep 0.1
  done
  [[ -s $STATE/pid ]] || fail "training did not start: $(tail -n 1 "$STATE/log")"
  echo "$(hostname): started, log in $STATE/log"
}

# The value of --workdir among the arguments of train; empty where there is none.
workdir_of() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --workdir=*) echo "${1#*=}" ;;
      --workdir) echo "${2:-}" ;;
    esac
    shift
  done
}

# Holds the lock, runs the training, writes down how it ended. The lock is inherited by Python.
supervise() {
  local pid code interrupted
  exec 9>"$STATE/lock"
  flock --nonblock 9 || fail "another run has just been started"
  # A VM that is taken away sends SIGTERM to all processes: training saves, and this one outlives it.
  trap 'interrupted=yes' TERM
  cd "$ROOT"
  "$PYTHON" -u -m albert_jax.train "$@" &
  pid=$!
  echo "$pid" >"$STATE/pid"
  while true; do
    interrupted=no code=0
    wait "$pid" || code=$?
    [[ $interrupted == yes ]] || break
  done
  echo "$code" >"$STATE/exit_code"
}

status() {
  local metrics
  echo "worker=$(hostname) $(state)"
  [[ -s $STATE/workdir ]] || return 0
  metrics=$(cd "$ROOT" && cd "$(<"$STATE/workdir")" 2>/dev/null && tail -n 1 metrics.jsonl 2>/dev/null) || return 0
  echo "metrics=$metrics"
}

state() {
  if running; then
    echo "state=running"
  elif [[ -s $STATE/exit_code ]]; then
    echo "state=exited code=$(<"$STATE/exit_code")"
  elif [[ -s $STATE/pid ]]; then
    echo "state=exited code=lost" # killed with its supervisor, or the VM was restarted
  else
    echo "state=none"
  fi
}

logs() {
  [[ -e $STATE/log ]] || fail "no log: nothing was started here"
  if running; then
    tail -n 200 --pid="$(<"$STATE/pid")" -f "$STATE/log"
  else
    tail -n 200 "$STATE/log"
  fi
  state
}

stop() {
  local second
  if running; then
    kill -TERM "$(<"$STATE/pid")" 2>/dev/null || true
    for ((second = 0; second < $1; second++)); do
      running || break
      sleep 1
    done
    ! running || fail "still saving after $1 s; wait (status), or stop again, which does not wait for the save"
  fi
  echo "worker=$(hostname) $(state)"
}

main "$@"
