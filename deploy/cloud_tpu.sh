#!/usr/bin/env bash
# A Cloud TPU pod slice without Kubernetes:
#   NAME=... ZONE=... BUCKET=... deploy/cloud_tpu.sh create|install|start|log|stop
# The machines find each other by the metadata server, so nothing is said about processes here.
set -euo pipefail
: "${NAME:?is missing: the name of the slice}" "${ZONE:?is missing, such as us-west4-a}"
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
REPOSITORY=${REPOSITORY:-https://github.com/OWNER/fovea.git}
CONFIG=${CONFIG:-configs/vit_b16_imagenet.py}
RUN=${RUN:-vit_b16}

# The same command on every machine, or on those of the second argument.
on() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="${2:-all}" --command="$1"
}

case "${1:-}" in
  create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" --spot
    ;;
  install) # uv brings a Python that is new enough; gcsfuse mounts the bucket, which all machines then share as a folder
    on "git clone --depth=1 $REPOSITORY fovea && cd fovea && pip install --quiet --user uv &&
      ~/.local/bin/uv venv --python=3.13 && ~/.local/bin/uv pip install --quiet -c requirements.txt '.[tpu]'"
    on "mkdir -p bucket && gcsfuse --implicit-dirs ${BUCKET:?is missing: the bucket for data and runs} bucket"
    ;;
  start) # as a service: it outlives this connection, and is sent SIGTERM when a machine shuts down
    on "cd fovea && sudo systemd-run --unit=train --uid=\$(id -u) --working-directory=\$PWD \
      --property=TimeoutStopSec=120 --property=SuccessExitStatus=75 --setenv=HOME=\$HOME \
      \$PWD/.venv/bin/python train.py --config=$CONFIG \
      --workdir=\$HOME/bucket/runs/$RUN --config.data.directory=\$HOME/bucket/tensorflow_datasets"
    ;;
  log)
    on "journalctl --unit=train --follow --lines=50" 0
    ;;
  stop) # on one machine is enough: all of them save the same step and leave
    on "sudo systemctl stop train" 0
    ;;
  *)
    sed -n 2,3p "$0" >&2
    exit 2
    ;;
esac
