#!/usr/bin/env bash
# Build one target of the Dockerfile and push it under a release's versions: push_image.sh TARGET SUFFIX
# Writes the outputs `name` and `digest`. Called by .github/workflows/image.yml, logged in and with a builder.
set -euo pipefail
target=$1 suffix=$2
name="ghcr.io/${GITHUB_REPOSITORY,,}$suffix"
version=${GITHUB_REF_NAME#v}
tags=(--tag "$name:$version")
# 1.2.3 is also 1.2 and 1; a version like 1.2.3-rc1 is only itself.
if [[ $version =~ ^([0-9]+)\.([0-9]+)\.[0-9]+$ ]]; then
  tags+=(--tag "$name:${BASH_REMATCH[1]}.${BASH_REMATCH[2]}" --tag "$name:${BASH_REMATCH[1]}")
fi
metadata=$(mktemp)
docker buildx build --push --provenance=false --target "$target" --metadata-file "$metadata" "${tags[@]}" \
  --label "org.opencontainers.image.source=$GITHUB_SERVER_URL/$GITHUB_REPOSITORY" \
  --label "org.opencontainers.image.revision=$GITHUB_SHA" \
  --label "org.opencontainers.image.version=$version" .
digest=$(jq --exit-status --raw-output '."containerimage.digest"' "$metadata")
printf 'name=%s\ndigest=%s\n' "$name" "$digest" >> "$GITHUB_OUTPUT"
