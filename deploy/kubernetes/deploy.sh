#!/bin/sh
# Creates the work pool `kubernetes` and deploys to it what prefect.yaml lists. Run it in the project's
# directory with PREFECT_API_URL set, TELL_IMAGE (the image of the runs) and TELL_DATA (where the data
# lie in the pods, below /data). TELL_GPUS: how many runs may train at once, 1 unless told otherwise.
set -eu
: "${PREFECT_API_URL:?the API of your Prefect server}" "${TELL_IMAGE:?}" "${TELL_DATA:?}"
export TELL_HOME=/opt/tell
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
sed "s|TELL_IMAGE|$TELL_IMAGE|" deploy/kubernetes/work-pool.json > "$work/pool.json"
# What trains waits in the queue `gpu` and gets a GPU; the rest gets none.
sed -e 's/name: local, work_queue_name: gpu, job_variables: \*environment/name: kubernetes, work_queue_name: gpu, job_variables: {<<: *environment, gpus: 1}/' \
  -e 's/name: local, work_queue_name: default/name: kubernetes, work_queue_name: default/' \
  prefect.yaml > "$work/prefect.yaml"
prefect work-pool create kubernetes --type kubernetes --base-job-template "$work/pool.json" --overwrite
prefect --no-prompt deploy --all --prefect-file "$work/prefect.yaml"
prefect work-queue set-concurrency-limit gpu "${TELL_GPUS:-1}" --pool kubernetes
