# shellcheck shell=bash
# The part of launch/tpu.sh that knows what gcloud's errors mean: what to do about each. Read by
# tpu.sh, never run by itself. What the last command said on stderr is in the file $ERRORS (see
# command.sh).
#
# The texts come from gcloud's own source and from what its users have reported: "Quota limit 'X' has
# been exceeded", "There is no more capacity in the zone", "exited with return code [255]" of ssh.

FAILURE='' # the kind of the last one: login, rights, quota, capacity, exists, type, ssh, gone, …

# refuse WHY FAILURE
refuse() {
  # shellcheck disable=SC2034  # heal.sh decides by it
  FAILURE=$2
  echo "error: $1." >&2
  return 1
}

# Says what to do about the error of a command to Google Cloud, sets FAILURE, and returns 1.
explain() {
  local quota
  case $(<"$ERRORS") in
    *'gcloud auth login'* | *eauthenticat* | *'active account'*)
      refuse 'gcloud is not logged in: gcloud auth login' login
      ;;
    *SERVICE_DISABLED* | *'has not been used in project'*)
      refuse 'the project has no Cloud TPU yet: gcloud services enable tpu.googleapis.com' rights
      ;;
    *PERMISSION_DENIED*)
      refuse "this account may not do that there, or $ZONE is not open to it: gcloud config list shows \
account and project; it takes the roles TPU Admin and Service Account User" rights
      ;;
    *[Qq]'uota '*)
      quota=$(grep -oE "[Qq]uota (limit )?'[^']+'" "$ERRORS" | head -n 1)
      refuse "the project's quota is too small (${quota:-its name stands above}). Ask for more in the \
console (IAM & Admin, Quotas), take a smaller --type or another --zone, or turn --spot \
$([[ $SPOT == yes ]] && echo off || echo on): it has a quota of its own. Old failed or suspended \
requests count too: gcloud compute tpus queued-resources list --zone=$ZONE" quota
      ;;
    *'no more capacity'* | *'nsufficient'*capacity* | *'not enough resources'* | *RESOURCE_EXHAUSTED* | *stockout*)
      refuse "$ZONE has no ${TYPE:-TPU} free now. Leave out --plain to wait in the queue, or try \
another --zone, or later" capacity
      ;;
    *ALREADY_EXISTS* | *'already exists'*)
      refuse "$NAME exists in $ZONE already: launch/tpu.sh status $ADDRESS, then use it, delete it, or \
choose another --name" exists
      ;;
    *ccelerator*type*)
      refuse "$ZONE does not offer $TYPE: gcloud compute tpus accelerator-types list --zone=$ZONE" type
      ;;
    *untime*ersion*)
      refuse "$ZONE does not know runtime version $VERSION: \
gcloud compute tpus tpu-vm versions list --zone=$ZONE, then --version=…" type
      ;;
    *) refuse 'gcloud failed; its own message stands above' other ;;
  esac
}

# The same for a command to the workers: what stands in $ERRORS may be theirs.
explain_workers() {
  case $(<"$ERRORS") in
    *'gcloud auth login'* | *eauthenticat*)
      refuse 'gcloud is not logged in: gcloud auth login' login
      ;;
    *'terminal state'* | *NOT_FOUND*)
      refuse "$NAME was taken away. Delete it and create it again, or let heal do that" gone
      ;;
    *'not present in the SSH agent'*)
      refuse "the ssh agent lacks the key, which several workers at once need: \
ssh-add ~/.ssh/google_compute_engine" login
      ;;
    *)
      ! ssh_lost || refuse "a worker does not answer ssh. Check: launch/tpu.sh status $ADDRESS (was it \
taken away?), and that the network lets tcp:22 in. What was started there goes on; the same command \
again is safe" ssh || return
      refuse 'a worker could not do it; what it said stands above' worker
      ;;
  esac
}

explain_silence() {
  tail -n 5 "$ERRORS" >&2
  explain_workers
}

ssh_lost() {
  grep -qE 'return code \[255\]|Could not SSH|Connection .*(refused|reset|closed|timed out)|kex_exchange|Network is unreachable|failed to connect' "$ERRORS"
}
