// Limits of the machine that a process runs on: what the kernel and the control groups (cgroups v1
// and v2) above it let it have. `root` leads every path: "" is this machine, tests have their own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace headstart {

// CPUs that this process may use, at least 1: its affinity mask, or the least CPU quota of its
// control group and those above if that is less.
int32_t UsableCpus(const std::string& root = "");

struct FreeMemory {
  int64_t bytes = 0;
  std::string limited_by;  // in words: whose limit it is
};
// What this process can still take without being killed or swapped: the least of what the machine
// has available and of what the limits of its control group and of those above leave (page cache
// counts as free). Nothing where the kernel does not say.
std::optional<FreeMemory> FindFreeMemory(const std::string& root = "");

// Whether `count` more threads can be had, by having them for a moment. RESOURCE_EXHAUSTED with how
// many there were and what limits them.
absl::Status CheckThreads(int32_t count);

}  // namespace headstart
