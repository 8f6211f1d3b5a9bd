#!/usr/bin/env bash
# Puts Chromium where the tests of the console look: on PATH, from Debian's package `chromium`.
set -euo pipefail
if command -v chromium >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "chromium not found: install it (on Debian, as root: apt-get install chromium) so that" \
        "the tests can open the console" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core || {
    apt-get update --quiet --quiet
    apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core
}
