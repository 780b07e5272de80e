# shellcheck shell=bash
# What launch/tpu.sh and launch/prepare_dataflow.sh share: the command line, words to a person,
# commands that are run or only printed. Read by them, never run by itself.
#
# A script sets, before it calls main "$@":
#   COMMANDS  its commands' names; command_NAME is the function of each
#   OPTIONS   of --name=value: name=VARIABLE
#   FLAGS     of --name: name=VARIABLE=value
#   PROGRAM   what gets the words after --, which are in ARGS
# and defines check, which finds everything that can be wrong before anything is asked of Google Cloud.
# Its help is the comment at its head.

SCRIPT=${0##*/}
COMMAND='' BUCKET='' DRY_RUN=no YES=no ARGS=()
APPEND='' # not empty: $ERRORS is added to
TEMP=$(mktemp -d)
ERRORS=$TEMP/errors # what the last command said on stderr, or they, where several ran side by side
trap 'rm -r "$TEMP"' EXIT
exec 3>&1 # dry-run commands go to the terminal even from inside $(…)

main() {
  parse "$@"
  check
  [[ $DRY_RUN == yes ]] || command -v gcloud >/dev/null \
    || die "gcloud is not installed. Install the Google Cloud CLI, then: gcloud auth login"
  "command_$COMMAND"
}

die() {
  echo "error: $*" >&2
  exit 1
}

usage_error() {
  echo "error: $* (launch/$SCRIPT --help)" >&2
  exit 2
}

say() { echo "$SCRIPT: $*"; }

parse() {
  local name
  for name in "${COMMANDS[@]}"; do
    [[ $name != "${1:-}" ]] || COMMAND=$name
  done
  if [[ -z $COMMAND ]]; then
    case ${1:-} in
      -h | --help | help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
      *) usage_error "no command '${1:-}'; there are ${COMMANDS[*]}" ;;
    esac
  fi
  shift
  while [[ $# -gt 0 ]]; do
    [[ $1 != -- ]] || break
    set_option "$1" || usage_error "unknown argument $1; options are written --option=value, and what $PROGRAM gets comes after --"
    shift
  done
  ARGS=("${@:2}")
  BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/}
}

set_option() {
  local known rest
  for known in "${OPTIONS[@]}"; do
    [[ $1 != "--${known%%=*}="* ]] || { printf -v "${known#*=}" %s "${1#*=}" && return; }
  done
  for known in "${FLAGS[@]}"; do
    rest=${known#*=}
    [[ $1 != "--${known%%=*}" ]] || { printf -v "${rest%%=*}" %s "${rest#*=}" && return; }
  done
  return 1
}

# Checks that there are words after -- exactly where a command ($1 says whether this one) takes them.
check_args() {
  if [[ $1 == yes ]]; then
    [[ ${#ARGS[@]} -gt 0 ]] || usage_error "nothing to $PROGRAM; put the arguments of $PROGRAM after --"
  else
    [[ ${#ARGS[@]} -eq 0 ]] || usage_error "$COMMAND takes nothing after --"
  fi
}

confirm() {
  local answer=''
  [[ $YES == no && $DRY_RUN == no ]] || return 0
  printf '%s [y/N] ' "$1"
  read -r answer || echo
  [[ $answer == [yY]* ]] || die "nothing was done."
}

# Runs a command, or prints it under --dry_run. What it says on stderr is also kept in $ERRORS.
perform() {
  if [[ $DRY_RUN == yes ]]; then
    { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; } >&3
    return
  fi
  { "$@" </dev/null 2>&1 1>&4 3>&- 4>&- | tee ${APPEND:+-a} "$ERRORS" >&2; } 4>&1
}

not_found() { grep -qE 'NOT_FOUND|not found' "$ERRORS"; }
