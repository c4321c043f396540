#!/usr/bin/env bash
# Have action.yml name a published image instead of the Dockerfile: pin_image.sh NAME@sha256:DIGEST
set -euo pipefail
cd "$(dirname "$0")/.."
image=$1
if [[ ! $image =~ ^[a-z0-9./_-]+@sha256:[0-9a-f]{64}$ ]]; then
  echo "pin_image: $image is not an image by its digest" >&2
  exit 2
fi
sed --in-place "s|^  image: .*|  image: docker://$image|" action.yml
grep --fixed-strings --line-regexp --quiet "  image: docker://$image" action.yml
