#!/bin/sh
# Runs an nvcc command (with -Xptxas=-v) and fails when ptxas reports spilled registers or serialised wgmma
# instructions (C7510 to C7518). Prints everything but the resource report of kernels that are fine.
report=$(mktemp)
trap 'rm -f "$report"' EXIT
"$@" 2>"$report"
status=$?
if [ $status -eq 0 ] &&
   grep -qE '[1-9][0-9]* bytes spill|C75[0-9][0-9]|serialized' "$report"; then
  cat "$report" >&2
  echo "check_ptxas: spilled registers or serialised wgmma instructions, see above" >&2
  exit 1
fi
grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame|^$' "$report" >&2
exit $status
