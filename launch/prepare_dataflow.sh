#!/usr/bin/env bash
# Prepares a token store on Google Cloud Dataflow: from text in a bucket to a store in a bucket.
#
#   launch/prepare_dataflow.sh image  --project=P --region=R [--image=I]     what every worker runs
#   launch/prepare_dataflow.sh run    --project=P --region=R --bucket=B [options] -- PREPARE_ARG…
#   launch/prepare_dataflow.sh status --project=P --region=R [--name=N]
#   launch/prepare_dataflow.sh cancel --project=P --region=R [--name=N] [--yes]
#
# run is python -m albert_jax.prepare PREPARE_ARG… --runner=DataflowRunner on this machine, with this
# checkout's environment (make setup EXTRAS=dataflow): it trains a vocabulary where one is to be
# trained, hands the shards to the workers, waits, and puts the manifest in its place. Input and
# output are gs://…; a --tokenizer may be a file here. What was stopped, by Ctrl-C or in any other
# way, goes on with the same command and --resume behind the --: finished shards are kept.
#
# Options
#   --project=P        a Google Cloud project
#   --region=R         for example us-central1: where the bucket is, so that traffic costs nothing
#   --bucket=B         for Dataflow's own files, under B/dataflow
#   --name=N           of the job (albert-jax-prepare)
#   --image=I          by default R-docker.pkg.dev/P/albert-jax/prepare:latest
#   --max_workers=W    machines at most (20); Dataflow takes fewer where they have nothing to do
#   --machine_type=T   (n2-standard-4) a shard at a time for each core
#   --beam_options=O   more for Beam, such as '--no_use_public_ips --subnetwork=…'
#   --dry_run          prints every command instead of running it
#   --yes              asks nothing
#
# Time: image about 15 minutes, once for each version of the code; run 5 minutes until the workers are
# up, then about a megabyte of text a second and core. A shard takes minutes.
# MONEY: every worker costs from the moment it is up until the job ends, by itself or with `cancel`.
# If this machine is lost, the job goes on for as long as it has shards to write: look at status. The
# image and what is in the bucket cost a little a month.
#
# Exit codes: 0 done, 1 it could not be done, 2 the command line is wrong.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=albert-jax-prepare PROJECT='' REGION='' IMAGE='' MAX_WORKERS=20
MACHINE_TYPE=n2-standard-4 BEAM_OPTIONS=''
PYTHON=${PYTHON:-$HERE/../.venv/bin/python}
COMMANDS=(image run status cancel)
OPTIONS=(name=NAME project=PROJECT region=REGION bucket=BUCKET image=IMAGE max_workers=MAX_WORKERS
  machine_type=MACHINE_TYPE beam_options=BEAM_OPTIONS)
FLAGS=(dry_run=DRY_RUN=yes yes=YES=yes)
PROGRAM=prepare
# shellcheck source=launch/command.sh
source "$HERE/command.sh"

# --- The command line ---------------------------------------------------------------------------

check() {
  local word
  [[ $PROJECT =~ ^[a-z][-a-z0-9.:]{4,}[a-z0-9]$ ]] || usage_error "--project='$PROJECT' is no project id"
  [[ $REGION =~ ^[a-z]+-[a-z]+[0-9]+$ ]] || usage_error "--region='$REGION' is no region; one is us-central1"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] \
    || usage_error "--name='$NAME': 1 to 63 of a-z, 0-9 and -, a letter first, no - last"
  IMAGE=${IMAGE:-$REGION-docker.pkg.dev/$PROJECT/albert-jax/prepare:latest}
  [[ $IMAGE =~ ^[a-z0-9.-]+/[a-z0-9._/:-]+$ ]] || usage_error "--image='$IMAGE' is no image; one is us-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG"
  if [[ $COMMAND != run ]]; then
    check_args no
    return
  fi
  [[ $BUCKET =~ ^[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]$ ]] \
    || usage_error "--bucket='$BUCKET' is no bucket name (without gs:// and folders)"
  [[ $MAX_WORKERS =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "--max_workers='$MAX_WORKERS': a whole number from 1"
  [[ $MACHINE_TYPE =~ ^[a-z][a-z0-9]*-[a-z0-9-]+$ ]] || usage_error "--machine_type='$MACHINE_TYPE' is no machine type; one is n2-standard-4"
  check_args yes
  for word in "${ARGS[@]}"; do
    case $word in
      --runner* | --beam_options*) usage_error "$word is this script's to say; what Beam gets goes into --beam_options before the --" ;;
      --input=gs://* | --output=gs://*) ;;
      --input=* | --output=*) usage_error "$word is on this machine, where the workers do not see it; put it into a bucket: gs://BUCKET/…" ;;
    esac
  done
}

# --- Google Cloud --------------------------------------------------------------------------------

cloud() { perform gcloud "$@" --project="$PROJECT" --quiet; }

# Says what to do about the error of the last command.
explain() {
  case $(<"$ERRORS") in
    *'gcloud auth login'* | *eauthenticat* | *'active account'*)
      die 'gcloud is not logged in: gcloud auth login, and for run: gcloud auth application-default login' ;;
    *SERVICE_DISABLED* | *'has not been used in project'*)
      die "the project has not all services yet: gcloud services enable --project=$PROJECT \
dataflow.googleapis.com compute.googleapis.com cloudbuild.googleapis.com artifactregistry.googleapis.com" ;;
    *PERMISSION_DENIED* | *'does not have permission'*)
      die 'this account may not do that there: gcloud config list shows account and project; it takes the roles
Dataflow Admin, Cloud Build Editor, Artifact Registry Administrator and Service Account User' ;;
    *[Qq]'uota '*)
      die "the project's quota is too small (its name stands above). Ask for more in the console (IAM & Admin,
Quotas), or take fewer --max_workers" ;;
    *) die 'gcloud failed; its own message stands above' ;;
  esac
}

# Sets JOB to the id of the job of this name that runs, if one does.
look() {
  JOB=$(cloud dataflow jobs list --region="$REGION" --status=active --filter="name=$NAME" --format='value(id)') || explain
  JOB=${JOB%%$'\n'*}
}

# --- The commands --------------------------------------------------------------------------------

# Sends the parts of the checkout that a worker needs to Cloud Build.
command_image() {
  local folder=$TEMP/source repository=${IMAGE%/*} version
  say "image $IMAGE"
  if [[ $IMAGE == "$REGION-docker.pkg.dev/$PROJECT/albert-jax/"* ]] \
    && ! cloud artifacts repositories describe albert-jax --location="$REGION" >/dev/null 2>&1; then
    not_found || { cat "$ERRORS" >&2 && explain; }
    say "makes the repository $repository"
    cloud artifacts repositories create albert-jax --location="$REGION" --repository-format=docker || explain
  fi
  if [[ $DRY_RUN == no ]]; then
    mkdir "$folder"
    tar -C "$HERE/.." --exclude=__pycache__ -cf - albert_jax pyproject.toml requirements.txt README.md LICENSE \
      | tar -C "$folder" -xf -
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
      || die "$PYTHON does not run; make setup EXTRAS=dataflow, or set PYTHON"
    sed "s/beam_python3\.11_sdk/beam_python${version}_sdk/" "$HERE/Dockerfile.prepare" >"$folder/Dockerfile"
  fi
  cloud builds submit "$folder" --tag="$IMAGE" --timeout=3600 || explain
  say "next: launch/prepare_dataflow.sh run --project=$PROJECT --region=$REGION --bucket=… -- --input=gs://… --output=gs://… …"
}

command_run() {
  local options
  look
  [[ -z $JOB ]] || die "$NAME runs already ($JOB). Wait for it (status), end it (cancel), or choose another --name."
  say "run $NAME in $REGION (project $PROJECT): up to $MAX_WORKERS x $MACHINE_TYPE; they cost until it ends, or: \
launch/prepare_dataflow.sh cancel --project=$PROJECT --region=$REGION --name=$NAME"
  options="--project=$PROJECT --region=$REGION --job_name=$NAME --temp_location=gs://$BUCKET/dataflow/temp \
--staging_location=gs://$BUCKET/dataflow/staging --sdk_container_image=$IMAGE --sdk_location=container \
--max_num_workers=$MAX_WORKERS --machine_type=$MACHINE_TYPE${BEAM_OPTIONS:+ $BEAM_OPTIONS}"
  set -- "$PYTHON" -m albert_jax.prepare "${ARGS[@]}" --runner=DataflowRunner --beam_options="$options"
  if [[ $DRY_RUN == yes ]]; then
    perform "$@"
    return
  fi
  "$@" && return # without the pipes of perform: its progress bar wants a terminal
  look
  [[ -z $JOB ]] || say "$NAME STILL RUNS AND COSTS ($JOB): launch/prepare_dataflow.sh cancel --project=$PROJECT --region=$REGION --name=$NAME"
  exit 1
}

command_status() {
  cloud dataflow jobs list --region="$REGION" --filter="name=$NAME" --limit=5 \
    --format='table(id,state,creationTime,stateTime)' || explain
}

command_cancel() {
  look
  [[ $DRY_RUN == no ]] || JOB=JOB_ID
  [[ -n $JOB ]] || die "no job $NAME runs in $REGION; check --name, --region and --project."
  confirm "Cancel $NAME ($JOB) in $REGION? Finished shards are kept."
  cloud dataflow jobs cancel "$JOB" --region="$REGION" || explain
}

main "$@"
