#!/bin/sh
# build.sh SOURCE [CMAKE_OPTION…]: compiles `headstart` into /opt/headstart/bin, with the names of functions, which stacks in the
# log need, and writes the packages that carry the libraries it links to /opt/headstart/runtime_packages.
set -eu
source=$1
shift
cmake -S "$source" -B /tmp/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DHEADSTART_BUILD_TESTS=OFF "$@"
cmake --build /tmp/build --target headstart
install -D /tmp/build/bin/headstart /opt/headstart/bin/headstart
strip --strip-debug /opt/headstart/bin/headstart
rm -r /tmp/build
ldd /opt/headstart/bin/headstart >/tmp/libraries
if grep 'not found' /tmp/libraries; then exit 1; fi
# By name and last folder: dpkg knows some libraries below /usr/lib that the loader finds in /lib.
sed -n 's|.*=> .*/\([^/]*/[^/]*\) (.*|*/\1|p' /tmp/libraries | xargs dpkg-query --search |
  sed 's/: .*//; s/:amd64$//' | sort -u >/opt/headstart/runtime_packages
rm /tmp/libraries
