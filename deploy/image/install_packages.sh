#!/bin/sh
# install_packages.sh PACKAGE…: installs them without recommended ones, security fixes included, and leaves no caches.
set -eu
apt-get update -qq
apt-get upgrade -y -qq >/dev/null
apt-get install -y -qq --no-install-recommends "$@" >/dev/null
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/log/apt /var/log/dpkg.log
