#!/usr/bin/env bash
# Print the package's version; with a tag as argument, fail unless it is that version's: version.sh [v1.2.3]
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed --quiet 's/^__version__ = "\(.*\)"$/\1/p' merge/__init__.py)
if (($#)) && [[ $1 != "v$version" ]]; then
  echo "version: tag $1 is not v$version, which merge/__init__.py says" >&2
  exit 1
fi
echo "$version"
